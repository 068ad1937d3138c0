"""The flat buffers of Megatron's distributed optimizer: which parameters share one, and where each of them begins.

    put_buffers(found, rank, mine, buffers_of(root, path), Borders(), path)       # what distrib_optim.pt holds, read
    coalesced(written, {Rank(): {"embedding.word_embeddings.weight": stored}}, None, Borders())         # and written

Parameters of a chunk and a dtype share a buffer, last ones first, each at a multiple of 64 elements of its bucket.  In
memory buckets are padded for the data-parallel ranks; in a file they follow each other without gaps, whatever the
number of these ranks.
Source: megatron/core `distributed/param_and_grad_buffer.py`, `distributed/distributed_data_parallel.py`,
`optimizer/distrib_optimizer.py` (get_parameter_state_dp_zero).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.containers.pickles.records import Global
from surgery.containers.torch_writer import Record
from surgery.errors import LayoutError, NoStateError, some
from surgery.formats.flat import aligned, cut, fill, joined
from surgery.formats.megatron.parameters import Chunks, Found, Parameter, parameters_of, state_of, trained_by
from surgery.formats.optimizer import ALONE, MASTER, M, V, Written
from surgery.formats.topology import Rank, Topology
from surgery.formats.torch_states import Fields, tensor_of
from surgery.formats.weave import Stored
from surgery.tensors.fingerprint import Uncounted
from surgery.tensors.lazy import Lazy

ALIGN = 64
BUFFERS = {"param": MASTER, M: M, V: V}
COALESCED, COUNT = "buckets_coalesced", "numel_unpadded"
GRADIENTS = {"bfloat16": "float32", "float16": "float16", "float32": "float32"}  # in which runs add them up by default
OTHER_SIZES = f"the sizes of its run are not those that args say, or files are of another save; {ALONE}"
_TIED = frozenset({"output_layer.weight"})  # the embedding again, on the last stage


@dataclass(frozen=True)
class Borders:
    """Where buckets end: behind the parameter that fills `size` elements, and around those that are `alone` in one."""

    size: int | None = None
    alone: frozenset[str] = frozenset()


def borders_of(args: Fields, rank: Rank) -> Borders:
    """Buckets end only where gradients are reduced meanwhile, and on the first stage; a tied head has its own."""
    alone = _TIED if args.get("untie_embeddings_and_output_weights") is False else frozenset[str]()
    if not args.get("overlap_grad_reduce") or rank.pp > 0:
        return Borders(None, alone)
    said, dp = args.get("ddp_bucket_size"), args.get("data_parallel_size")
    size = said if type(said) is int and said > 0 else max(40_000_000, 1_000_000 * (dp if type(dp) is int else 1))
    return Borders(size, alone)


def wanted_buffers(mine: Sequence[Parameter]) -> Iterator[tuple[str, list[Parameter]]]:
    """(dtype, parameters) of the buffers that a rank has, one for each chunk and dtype: last parameters first."""
    for chunk in dict.fromkeys(p.chunk for p in mine):
        for dtype in dict.fromkeys(p.weight.dtype for p in mine if p.chunk == chunk):
            yield dtype, [p for p in reversed(mine) if p.chunk == chunk and p.weight.dtype == dtype]


def places_of(owned: Sequence[Parameter], borders: Borders, align: int = ALIGN) -> tuple[dict[str, int], int]:
    """Where each parameter of a buffer begins, and how many elements it has."""
    shapes = [(p.name, p.weight.shape) for p in owned]
    return aligned(shapes, align, borders.size, borders.alone)


def holder(rank: Rank, topology: Topology, *, experts: bool) -> Rank:
    """Whose file holds a rank's state: that of the first of the data-parallel ranks which divide it among them.

    Ranks are numbered as in `Topology.grid`: those of the experts may have dense parameters that others store.
    """
    etp = topology.expert_tp
    if not experts:
        return rank._replace(ep=rank.tp // etp % topology.ep)
    return rank._replace(tp=etp * (rank.ep % (topology.tp // etp)) + rank.tp % etp)


# ------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Buffer:
    """What is stored of a buffer: the masters and moments of each bucket, or of all buckets without gaps."""

    dtype: str
    pieces: tuple[Mapping[str, Lazy], ...]
    coalesced: bool = False

    @property
    def sizes(self) -> list[int]:
        return [next(iter(piece.values())).shape[0] for piece in self.pieces]

    def places(self, owned: Sequence[Parameter], borders: Borders) -> list[tuple[int, int]] | None:
        """(piece, place in it) of each parameter; None if they do not fill it in any way that is known.

        Without the sizes of buckets the layouts of a release, and of a run with overlapping buckets, are tried.  The
        masters prove it.
        """
        if not self.coalesced:
            return fill([p.weight.shape for p in owned], self.sizes, ALIGN)
        kinds = (Borders(None, borders.alone), borders, Borders(), Borders(borders.size))
        tried = (*(places_of(owned, kind) for kind in kinds), places_of(owned, Borders(), 1))
        found = next((found for found, total in tried if self.sizes == [total]), None)
        return None if found is None else [(0, found[p.name]) for p in owned]


def buffer_of(dtype: str, pieces: Sequence[Mapping[str, Lazy]], path: Path, *, coalesced: bool = False) -> Buffer:
    """Raises NoStateError for the state of other optimizers, LayoutError for buffers that are none of one length."""
    for piece in pieces:
        if piece.keys() != BUFFERS.keys():
            held = some(sorted(map(str, piece)))
            raise NoStateError(f"has a bucket of {held}: {some(sorted(BUFFERS))} are read", file=path, hint=ALONE)
        shapes = {tensor.shape for tensor in piece.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise LayoutError(f"has buffers in the shapes {some(sorted(shapes))}: flat ones of one length are read",
                              file=path, hint=ALONE)  # fmt: skip
    return Buffer(dtype, tuple(pieces), coalesced)


def buffers_of(root: object, path: Path) -> list[Buffer]:
    """What distrib_optim.pt holds of one optimizer."""
    if not isinstance(root, dict) or not root:
        raise LayoutError("holds no buffers of an optimizer", file=path, hint=ALONE)
    if not root.get(COALESCED):
        raise NoStateError("is of a release before 2024-05, which laid its buffers out in other ways: it is not read",
                           file=path, hint=ALONE)  # fmt: skip
    return [buffer_of(dtype, [{key: tensor_of(fields, key, path) for key in fields if key != COUNT}], path,
                      coalesced=True)
            for i in sorted(k for k in root if type(k) is int) for dtype, fields in _pairs(root[i])]  # fmt: skip


def _pairs(buffer: object) -> Iterator[tuple[str, Fields]]:
    """(dtype of the parameters, tensors) of one buffer."""
    for key, fields in buffer.items() if isinstance(buffer, dict) else ():
        kind = key[0] if isinstance(key, tuple) and key else None
        if isinstance(kind, Global) and isinstance(fields, dict):
            yield kind.name, fields


def put_buffers(
    found: Found, rank: Rank, mine: Sequence[Parameter], buffers: Sequence[Buffer], borders: Borders, path: Path
) -> None:
    """The masters and moments of a rank's parameters."""
    wanted = list(wanted_buffers(mine))
    if [dtype for dtype, _ in wanted] != [buffer.dtype for buffer in buffers]:
        raise LayoutError(f"has buffers of {some(b.dtype for b in buffers)}, the model {some(d for d, _ in wanted)}",
                          file=path, hint=OTHER_SIZES)  # fmt: skip
    for (_, owned), buffer in zip(wanted, buffers, strict=True):
        places = buffer.places(owned, borders)
        if places is None:
            count = sum(math.prod(p.weight.shape) for p in owned)
            what = f"{len(owned)} parameters of {count:,} (tensor rank {rank.tp}, stage {rank.pp})"
            raise LayoutError(f"has buffers of {some(buffer.sizes)} elements, which {what} do not fill in any known "
                              "way", file=path, hint=OTHER_SIZES)  # fmt: skip
        for parameter, (number, start) in zip(owned, places, strict=True):
            for key, role in BUFFERS.items():
                found.put(role, rank, parameter, cut(buffer.pieces[number][key], start, parameter.weight.shape))


# ------------------------------------------------------------------------------------------------------- writing


def coalesced(written: Written, chunks: Chunks, which: int | None, borders: Borders) -> dict[Any, Any]:
    """What distrib_optim.pt holds of one of a rank's optimizers.  Raises LayoutError for dtypes of no run."""
    out: dict[Any, Any] = {COALESCED: True}
    for i, (dtype, owned) in enumerate(wanted_buffers(trained_by(which, parameters_of(chunks)))):
        if dtype not in GRADIENTS:
            raise LayoutError(f"Megatron's optimizer trains no weights in {dtype}", hint="--dtype fp32")
        places, total = places_of(owned, borders)
        tensors = {key: joined([(places[p.name], _held(written, role, chunks, p)) for p in owned])
                   for key, role in BUFFERS.items()}  # fmt: skip
        out[i] = {(Record("torch", dtype), Record("torch", GRADIENTS[dtype])): {**tensors, COUNT: total}}
    return out


def _held(written: Written, role: str, chunks: Chunks, p: Parameter) -> Lazy:
    """The state of a parameter, which is its own master in fp32.  Replicas are counted where their originals are."""
    stored = state_of(written, chunks, p).get(role, Stored(p.weight, True))
    return Uncounted(stored.tensor) if stored.copy else stored.tensor
