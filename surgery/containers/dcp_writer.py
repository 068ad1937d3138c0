"""Plans a folder as torch.distributed.checkpoint writes it: `__R_N.distcp` files and the pickle `.metadata`.

    dcp_files("model_and_optim/", {"model.embeddings.weight": lazy}, {"optim.step": 7})

A .distcp file is a concatenation of complete torch files, one per chunk of a tensor or per object; `.metadata` says
where each lies.  Only names that torch itself has are in the pickle, so every reader of torch loads it.  Source:
torch/distributed/checkpoint/{metadata,filesystem,planner_helpers,default_planner}.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

from surgery.containers.output import Literal, OutputFile, Region, text_file
from surgery.containers.pickles.pickler import Record, pickle_tree
from surgery.containers.torch_writer import torch_file
from surgery.tensors.lazy import ITEMSIZE, Fill, Lazy, Shape, Slice, boxes

CHUNK = 1 << 30  # bytes of the largest chunk: what a reader has to hold in memory at once
FILE = 5_000_000_000  # bytes of the largest file, unless one chunk alone is larger
ALIGN = 64
_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"

Keys = tuple[Any, ...]


def dcp_files(
    prefix: str,
    tensors: Mapping[str, Lazy],
    objects: Mapping[str, Any] | None = None,
    *,
    planner: Mapping[str, Keys] | None = None,
    copies: frozenset[str] = frozenset(),
    rank: int = 0,
    chunk_bytes: int = CHUNK,
    file_bytes: int = FILE,
) -> list[OutputFile]:
    """The files below the folder `prefix` ("" or ending in "/") that hold `tensors` and `objects` by name.

    objects   whatever `torch_file` can hold; readers get it from `torch.load`
    planner   name -> the path of keys that it was flattened from: readers without a state dict of their own unflatten
              it (torch's DefaultSavePlanner stores it; None where upstream stores none)
    copies    names of tensors that are replicas (see Region)

    Tensors of more than `chunk_bytes` are cut into chunks along their first dimensions, files end at `file_bytes`.
    """
    files = [_File(f"__{rank}_0.distcp")]
    places: list[tuple[Record, Record]] = []
    known: dict[str, Record] = {}

    def put(archive: OutputFile, index: Record) -> None:
        if files[-1].archives and files[-1].next + archive.size > file_bytes:
            files.append(_File(f"__{rank}_{len(files)}.distcp"))
        at = files[-1].add(archive)
        places.append((index, _storage_info(files[-1].name, at, archive.size)))

    for name, tensor in tensors.items():
        chunks = []
        for i, (start, piece) in enumerate(_chunks(tensor, chunk_bytes)):
            put(_archive(f"{name}[{i}]" if i else name, piece, name in copies), _index(name, start, i))
            chunks.append(_record("ChunkStorageMetadata", {"offsets": _size(start), "sizes": _size(piece.shape)}))
        known[name] = _record(
            "TensorStorageMetadata",
            {"properties": _properties(tensor.dtype), "size": _size(tensor.shape), "chunks": chunks},
        )
    for name, tree in (objects or {}).items():
        put(torch_file("archive", tree), _record("MetadataIndex", {"fqn": name, "offset": None, "index": None}))
        known[name] = _record("BytesStorageMetadata", {})
    fields = {"state_dict_metadata": known, "planner_data": planner and dict(planner), "storage_data": dict(places)}
    metadata, _ = pickle_tree(_record("Metadata", fields))
    return [*(f.plan(prefix) for f in files), text_file(f"{prefix}.metadata", metadata)]


# ----------------------------------------------------------------------------------------------- chunks and files


def _chunks(tensor: Lazy, limit: int) -> Iterator[tuple[Shape, Lazy]]:
    """(offset, piece) of the chunks of a tensor; an empty or 0-dim tensor is one chunk."""
    if not tensor.shape or 0 in tensor.shape:
        yield (0,) * len(tensor.shape), tensor
        return
    for box in boxes(tensor.shape, ITEMSIZE[tensor.dtype], max(limit, 1)):
        piece = tensor
        for dim, (a, b) in enumerate(box):
            if (a, b) != (0, tensor.shape[dim]):
                piece = Slice(piece, dim, a, b)
        yield tuple(a for a, _ in box), piece


@cache
def _template(dtype: str, shape: Shape) -> OutputFile:
    """The torch file of any tensor of this dtype and shape: only its bytes and their CRC differ."""
    return torch_file("archive", Fill(shape, dtype))


def _archive(name: str, tensor: Lazy, copy: bool) -> OutputFile:
    plan = _template(tensor.dtype, tensor.shape)
    return OutputFile(plan.name, plan.size, plan.head, (Region(name, tensor, plan.regions[0].offset, copy),), plan.tail)


@dataclass
class _File:
    """A .distcp file in the making: the archives in it, and where each begins."""

    name: str
    archives: list[tuple[int, OutputFile]] = field(default_factory=list)
    end: int = 0

    @property
    def next(self) -> int:
        """Where the next archive may begin."""
        return self.end + -self.end % ALIGN

    def add(self, archive: OutputFile) -> int:
        at = self.next
        self.archives.append((at, archive))
        self.end = at + archive.size
        return at

    def plan(self, prefix: str) -> OutputFile:
        regions = tuple(
            Region(r.name, r.tensor, at + r.offset, r.copy) for at, archive in self.archives for r in archive.regions
        )
        return OutputFile(prefix + self.name, self.end, b"", regions, _tail(self.archives))


def _tail(archives: Sequence[tuple[int, OutputFile]]) -> Callable[[Sequence[int]], Iterable[Literal]]:
    def tail(crcs: Sequence[int]) -> Iterator[Literal]:
        done = 0
        for at, archive in archives:
            count = len(archive.regions)
            assert archive.tail is not None
            for offset, data in archive.tail(crcs[done : done + count]):
                yield at + offset, data
            done += count

    return tail


# ------------------------------------------------------------------------------------------------------- .metadata


def _record(name: str, state: Any, module: str = _METADATA) -> Record:
    return Record(module, name, (), state, new=True)


@lru_cache(1 << 14)
def _size(shape: Shape) -> Record:
    return Record("torch", "Size", (shape,))


@cache
def _properties(dtype: str) -> Record:
    """dtype, layout, requires_grad, memory format, pin_memory: what a plain contiguous tensor has"""
    layout = Record("torch.serialization", "_get_layout", ("torch.strided",))
    contiguous = Record(_METADATA, "_MEM_FORMAT_ENCODING", (0,))
    return _record("TensorProperties", (Record("torch", dtype), layout, False, contiguous, False))


def _index(name: str, start: Shape, i: int) -> Record:
    return _record("MetadataIndex", {"fqn": name, "offset": _size(start), "index": i})


def _storage_info(file: str, offset: int, length: int) -> Record:
    return _record("_StorageInfo", {"relative_path": file, "offset": offset, "length": length}, _FILESYSTEM)
