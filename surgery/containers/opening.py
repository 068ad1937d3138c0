"""Open any checkpoint file by its content, and any set of files as one table of lazy tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from surgery.arguments import checked
from surgery.containers.dcp import Dcp
from surgery.containers.pickles.records import Obj, Storage, TensorRecord
from surgery.containers.safetensors import Safetensors
from surgery.containers.text import read_json
from surgery.containers.torch_legacy import TorchLegacy
from surgery.containers.torch_zip import TorchZip, Tree
from surgery.errors import FileError, show, some
from surgery.tensors.elsewhere import POINTER
from surgery.tensors.files import File, plain_name
from surgery.tensors.lazy import Lazy

CheckpointFile = TorchZip | TorchLegacy | Safetensors

# (first bytes, what the file is, what to do)
_REFUSED = (
    (POINTER, "stands for an object that lies elsewhere, and is not the file itself", "give the address that is in it"),
    (b"version https://git-lfs", "is a git-lfs pointer, not the file itself", "run `git lfs pull`"),
    (b"<", "is an HTML or XML page, not a checkpoint", "the download failed; download the file itself"),
    (b"\x1f\x8b", "is compressed by gzip", "unpack it first"),
    (b"BZh", "is compressed by bzip2", "unpack it first"),
    (b"\xfd7zXZ\0", "is compressed by xz", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd", "unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive", "unpack it first"),
    (b"Rar!", "is a RAR archive", "unpack it first"),
    (b"PK\5\6", "is an empty zip archive", "the file is damaged; copy or download it again"),
    (b"GGUF", "is a GGUF file", "convert it to safetensors first"),
)
_SINGLE_AND_INDEX = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


class Container(Protocol):
    """What was opened: a file, or a folder of files that belong together."""

    @property
    def paths(self) -> list[Path]:
        """Its files."""

    @property
    def globals(self) -> list[str]:
        """The names that its pickles mention."""

    @property
    def entries(self) -> Any:
        """All that it holds: tensors and other leaves in dicts, lists and tuples."""


@dataclass(frozen=True)
class TensorTable(Mapping[str, Lazy]):
    """Tensors by name, the containers that they lie in, and the index, if one was read."""

    tensors: Mapping[str, Lazy]
    containers: tuple[Container, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    index: Path | None = None

    @property
    def globals(self) -> tuple[str, ...]:
        """The names that pickles mention."""
        return tuple(sorted({name for container in self.containers for name in container.globals}))

    def __repr__(self) -> str:
        first = ", ".join(f"{some([name])} {t.dtype}{list(t.shape)}" for name, t in list(self.tensors.items())[:3])
        return f"{len(self)} tensors: {first}{', ...' if len(self) > 3 else ''}"

    def __getitem__(self, name: str) -> Lazy:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def open_file(path: str | os.PathLike[str]) -> CheckpointFile:
    """One checkpoint file, whatever its name says.  Raises FileError, also for what is recognised but refused."""
    file = File(path)
    head = file.read(0, min(file.size, 512), "the first bytes")
    if not file.size:
        raise FileError("is empty", file=file.path, hint="copy or download it again")
    if head[8:9] == b"{" and head[6:8] == b"\0\0":  # first: the length before it may begin like anything below
        return Safetensors(file)
    for magic, what, hint in _REFUSED:
        if head.startswith(magic):
            raise FileError(what, file=file.path, byte=0, hint=hint)
    if head[257:262] == b"ustar" or head.startswith(b"sys_info\0"):
        hint = "if torch wrote it (before 0.4), load and save it again with an old torch in a sandbox; else unpack it"
        raise FileError("is a tar archive", file=file.path, byte=0, hint=hint)
    if not head.strip(b"\0"):
        raise FileError("begins with zeros only", file=file.path, byte=0, hint="the copy or download is incomplete")
    if head.startswith(b"PK\3\4"):
        return TorchZip(file)
    if head.startswith(b"\x80"):
        return TorchLegacy(file)
    if head[8:9] == b"{":
        return Safetensors(file)
    hint = "supported: safetensors, torch.save (zip or legacy), folders with an index, DCP folders"
    raise FileError(f"is no checkpoint that surgery knows; it begins with {show(head[:8])}", file=file.path, hint=hint)


@checked
def open_tensors(path: str | os.PathLike[str]) -> TensorTable:
    """All tensors of a file, an index (`*.index.json`), a folder of either, or a DCP folder.  Raises FileError."""
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if path.name.endswith(".index.json"):
        return _open_index(path)
    if path.name == ".metadata":
        return _open_folder(path.parent)
    return _table([open_file(path)])


def _open_folder(folder: Path) -> TensorTable:
    if os.path.lexists(folder / ".metadata"):
        others = [name for pair in _SINGLE_AND_INDEX for name in pair if os.path.lexists(folder / name)]
        if others:
            hint = "move away what is not wanted"
            raise FileError(f"holds both .metadata and {others[0]}", file=folder, hint=hint)
        dcp = Dcp(folder)
        return TensorTable(dcp.tensors, (dcp,))
    for single, index in _SINGLE_AND_INDEX:
        found = [name for name in (single, index) if os.path.lexists(folder / name)]
        if len(found) == 2:
            hint = f"move away the one that is not wanted (transformers would read {single})"
            raise FileError(f"holds both {single} and {index}", file=folder, hint=hint)
        if found:
            return open_tensors(folder / found[0])
    if pieces := shards(folder):
        return _table([open_file(path) for path in pieces])
    wanted = some((name for pair in _SINGLE_AND_INDEX for name in pair), 9)
    raise FileError("holds no checkpoint that surgery knows", file=folder, hint=f"looked for {wanted}, .metadata")


def shards(folder: Path) -> list[Path]:
    """model-00001-of-0000N.safetensors and so on, in order, of a folder without an index; none if one is missing."""
    for stem, end in (("model", "safetensors"), ("pytorch_model", "bin")):
        found = sorted(folder.glob(f"{stem}-*-of-*.{end}"))
        if found and [p.name for p in found] == [f"{stem}-{i:05d}-of-{len(found):05d}.{end}"
                                                 for i in range(1, len(found) + 1)]:  # fmt: skip
            return found
    return []


def _open_index(path: Path) -> TensorTable:
    """A table over shards.  Each listed tensor must lie in its shard, and no shard may hold others.

    Names of shards are plain, so nothing outside the folder is named; a shard itself may be a symbolic link to a
    regular file, as in Hugging Face's cache.
    """
    index = read_json(path, "index")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError("has no weight_map", file=path, hint="an index maps tensor names to files in 'weight_map'")
    names: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        names.setdefault(plain_name(shard, f"the entry of {show(name)}", path), []).append(name)
    for shard in names:
        if not os.path.lexists(path.parent / shard):
            hint = "copy or download all shards"
            raise FileError(f"shard {show(shard)} is missing", file=path, hint=hint)
    table = _table([open_file(path.parent / shard) for shard in names])
    owners = {name: Path(file.path).name for name, file in _owners(table).items()}
    _compare(path, weight_map, owners)
    return TensorTable({name: table[name] for name in weight_map}, table.containers, table.metadata, path)


def _owners(table: TensorTable) -> dict[str, File]:
    return {name: tensor.file for name, tensor in table.items()}  # type: ignore[attr-defined]


def _compare(path: Path, listed: Mapping[str, str], owners: Mapping[str, str]) -> None:
    wrong = [show(name) for name, shard in listed.items() if owners.get(name) != shard]
    if wrong:
        hint = "the index is from another save, or a shard is damaged"
        raise FileError(f"lists tensors that are not in their shard: {some(wrong)}", file=path, hint=hint)
    extra = [f"{show(name)} in {show(shard)}" for name, shard in owners.items() if name not in listed]
    if extra:
        hint = "the index is from another save; write a new one"
        raise FileError(f"does not list tensors that its shards hold: {some(extra)}", file=path, hint=hint)


def _table(files: list[CheckpointFile]) -> TensorTable:
    tensors: dict[str, Lazy] = {}
    metadata: dict[str, str] = {}
    for container in files:
        if isinstance(container, Tree):
            _only_plain(container)
        for name, tensor in container.tensors.items():
            if name in tensors:
                raise FileError(f"tensor {show(name)} also lies in another shard", file=container.file.path)
            tensors[name] = tensor
        metadata |= _metadata(container)
    return TensorTable(tensors, tuple(files), metadata)


def _metadata(container: CheckpointFile) -> Mapping[str, str]:
    if not isinstance(container, Safetensors):
        return {}
    if "DCP_SHARDING_INFO" in container.metadata:
        hint = "consolidate the shards first (torch.distributed.checkpoint, consolidate_hf_safetensors_files)"
        raise FileError("is a shard whose tensors are parts of others", file=container.file.path, hint=hint)
    return container.metadata


def _only_plain(tree: Tree) -> None:
    """Raise FileError if a leaf is a tensor that cannot be read as plain numbers: never skip one in silence."""
    for name, leaf in tree.leaves.items():
        if isinstance(leaf, Storage) or (isinstance(leaf, Obj) and _holds_data(leaf)):
            kind = leaf.path if isinstance(leaf, Obj) else "torch.Storage"
            raise FileError(
                f"{show(name)} is no plain tensor but {show(kind)}",
                file=tree.file.path,
                hint="sparse, quantised, conjugated or wrapped tensors are not read; re-save them as plain ones",
            )


def _holds_data(record: Obj) -> bool:
    """Whether a record is, or directly holds, something with elements."""
    if "_rebuild_" in record.path and record.path.startswith("torch."):
        return True
    held: list[Any] = [*record.args, *record.state.values()]
    return any(isinstance(x, (TensorRecord, Storage)) for x in held)
