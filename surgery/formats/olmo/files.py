"""Where the tensors of an OLMo checkpoint are: five layouts on disk, one table of tensors with plain names.

    stored = read_tensors(Path("step1000-unsharded"))
    stored.tensors["transformer.blocks.0.att_proj.weight"]

model.pt; model.safetensors, whose names are pickles; and the sharded ones: `model_and_optim/` (torch's distributed
checkpoints), rankN.pt (ShardedTensor), model/rankN.pt (flat parameters of FSDP), model/rank_N.safetensors.
Source: allenai/OLMo `olmo/checkpoint.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from surgery.containers import TensorTable, open_tensors
from surgery.errors import FileError, LayoutError, show, some
from surgery.formats.base import Place
from surgery.formats.olmo.names import decode_names, is_encoded
from surgery.formats.olmo.sharded import read_flat_files, read_flat_params, read_sharded_tensors
from surgery.tensors.lazy import Lazy

T = TypeVar("T")
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module|module|model)\.")
_GROUPED = re.compile(r"(?<=transformer\.)block_groups\.(\d+)\.(\d+)\.")
_BLOCK = re.compile(r"(?<=transformer\.)blocks\.(\d+)\.")
_STEP = re.compile(r"step(\d+)(-unsharded)?$")


@dataclass(frozen=True)
class Stored:
    """Tensors under the names of a model of single blocks, the table that they come from, and what else was read."""

    tensors: Mapping[str, Lazy]
    table: TensorTable
    layout: str
    read: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Layout:
    """A way of storing a checkpoint: the file by which it is known, how it is read, and files without weights."""

    name: str
    mark: str
    read: Callable[[Path], TensorTable]
    also: tuple[str, ...] = ()


def _safetensors(folder: Path) -> TensorTable:
    table = open_tensors(folder / "model.safetensors")
    if not is_encoded(table.tensors):
        return table
    plain, pickled = decode_names(table.tensors, str(folder / "model.safetensors"))
    if pickled:
        raise FileError(f"holds {some(map(show, pickled))}, which are no tensors", file=folder / "model.safetensors")
    return replace(table, tensors=plain)


def _distributed(folder: Path) -> TensorTable:
    table = open_tensors(folder / "model_and_optim")
    return replace(table, tensors={k: t for k, t in table.items() if not k.startswith("optim.")})


LAYOUTS: tuple[Layout, ...] = (
    Layout("unsharded", "model.pt", lambda folder: open_tensors(folder / "model.pt")),
    Layout("unsharded safetensors", "model.safetensors", _safetensors),
    Layout("sharded: torch_new", "model_and_optim/.metadata", _distributed),
    Layout("sharded: torch_legacy", "rank0.pt", read_sharded_tensors),
    Layout("sharded: local", "model/rank0.pt", read_flat_params, ("metadata.yaml",)),
    Layout("sharded: olmo_core", "model/metadata.json", lambda folder: read_flat_files(folder / "model"),
           ("model/metadata.json",)),
)  # fmt: skip


def find_place(folder: Path, is_checkpoint: Callable[[Path], bool]) -> Place | None:
    """The folder itself if it is a checkpoint, else the one with the highest step in it; None if there is none."""
    if is_checkpoint(folder):
        m = _STEP.match(folder.resolve().name)
        return Place(folder, folder, details={"step": int(m[1])} if m else {})
    steps = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if (m := _STEP.match(path.name)) and is_checkpoint(path):
            steps.append((int(m[1]), bool(m[2]), path))
    if not steps:
        return None
    step, _, newest = max(steps)
    note = f"the folder is a run's: its newest checkpoint {newest.name} is read"
    return Place(folder, newest, notes=(note,), details={"step": step})


def layout_of(folder: Path) -> Layout | None:
    """The layout of a checkpoint's folder, None if it is none."""
    if not (folder / "config.yaml").is_file():
        return None
    return next((found for found in LAYOUTS if (folder / found.mark).is_file()), None)


def locate(folder: Path) -> Place | None:
    """The checkpoint of OLMo in a folder, in any layout."""
    return find_place(folder, lambda path: layout_of(path) is not None)


def read_tensors(folder: Path) -> Stored:
    """All tensors of the model in a checkpoint's folder.  Raises SurgeryError."""
    found = layout_of(folder)
    if found is None:
        raise FileError("holds no checkpoint of OLMo", file=folder, hint="config.yaml, and model.pt or shards")
    table = found.read(folder)
    read = [path for name in found.also if (path := folder / name).is_file()]
    return Stored(ungrouped(unwrapped(table, folder)), table, found.name, tuple(read))


def unwrapped(tensors: Mapping[str, Lazy], folder: Path) -> dict[str, Lazy]:
    """The tensors under the names that they have in a model that is not wrapped for training."""
    out: dict[str, Lazy] = {}
    for name, tensor in tensors.items():
        for new in plain(name):
            if new in out:
                raise LayoutError(f"{show(name)} and another tensor both mean {show(new)}", file=folder)
            out[new] = tensor
    return out


def plain(name: str) -> list[str]:
    """The names that a stored tensor has in a model that is not wrapped: two for the shared norm of old releases."""
    name = _WRAPPERS.sub("", name)
    if re.fullmatch(r"transformer\..*\.norm\.(weight|bias)", name):
        return [re.sub(r"\.norm\.(\w+)$", rf".{new}.\1", name) for new in ("attn_norm", "ff_norm")]
    return [name]


def ungrouped(tensors: Mapping[str, T]) -> dict[str, T]:
    """block_groups.G.I -> blocks.N, whatever the config says about the size of a group, as OLMo itself does."""
    size = 1 + max((int(m[2]) for name in tensors if (m := _GROUPED.search(name))), default=0)
    return {_GROUPED.sub(lambda m: f"blocks.{int(m[1]) * size + int(m[2])}.", k): t for k, t in tensors.items()}


def grouped(name: str, size: int) -> str:
    """blocks.N -> block_groups.G.I, the inverse, for groups of more than one block."""
    if size == 1:
        return name
    return _BLOCK.sub(lambda m: "block_groups.{}.{}.".format(*divmod(int(m[1]), size)), name)
