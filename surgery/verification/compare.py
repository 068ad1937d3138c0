"""Are two checkpoints, in any formats and at any parallel sizes, the same model?  Part by part, then the configs.

    result = compare(open_checkpoint("Llama-2-7b"), open_checkpoint("Llama-2-7b-hf"), max_memory=256 << 20)
    result.same, result.verdict          # True, "the same model"
    for part in result.parts: print(part.text)

Every byte of both is read once, in blocks, while both content digests are computed.  (A model that is tied on one
side only is the exception: that side's embedding is read again, to compare it with the other's head.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from surgery.errors import shown
from surgery.formats.base import Checkpoint
from surgery.formats.unknown import Unknown
from surgery.model.spec import layout
from surgery.tensors.files import check_unchanged
from surgery.tensors.fingerprint import Ledger
from surgery.tensors.lazy import ITEMSIZE, Box, Lazy, Map, boxes, walk, whole
from surgery.verification.configs import differences
from surgery.verification.findings import Comparison, Part, Remark, Side, Surplus
from surgery.verification.values import Tally, Values
from surgery.writing.ahead import ahead
from surgery.writing.stream import block_size

if TYPE_CHECKING:
    import torch

Progress = Callable[[int], None]


def compare(a: Checkpoint, b: Checkpoint, *, max_memory: int, progress: Progress | None = None) -> Comparison:
    """Compare two opened checkpoints in blocks that fit into `max_memory` bytes.

    progress is called with the number of bytes read since it was called last.  Raises SurgeryError if a file turns
    out to be broken, or is changed meanwhile.
    """
    ledgers = Ledger(), Ledger()
    for ledger, side in zip(ledgers, (a, b), strict=True):
        for name, part in side.parts.items():
            ledger.tap(name, part)
    tallies: dict[str, Tally] = {}
    odd_rows: set[str] = set()  # parts whose surplus rows are not all zeros
    with ahead(_blocks(list(_pairs(a, b)), max_memory)) as read:
        for pair, box, data in read:
            for ledger, seen, count in zip(ledgers, data, pair.counted, strict=True):
                if seen is not None and count:
                    with ledger.collect() as counts:
                        ledger.count(pair.name, seen, box)
                    ledger.add(counts)
                    if progress:
                        progress(seen.nbytes)
            x, y = data
            if x is not None and y is not None:
                tallies.setdefault(pair.name, Tally(*_kinds(pair))).add(x, y, box)
            elif pair.surplus and any(t is not None and bool(t.count_nonzero()) for t in data):
                odd_rows.add(pair.name)
    for side in (a, b):
        check_unchanged(side.stamps)
    found = {name: values for name, tally in tallies.items() if (values := tally.values())}
    parts = (_part(name, a, b, found.get(name), name in odd_rows) for name in dict.fromkeys([*a.parts, *b.parts]))
    sides = _side(a, ledgers[0]), _side(b, ledgers[1])
    return Comparison(*sides, tuple(p for p in parts if p is not None), differences(a, b), _remarks(a, b))


def _side(checkpoint: Checkpoint, ledger: Ledger) -> Side:
    spec, parts = checkpoint.spec, checkpoint.parts
    nbytes = sum(part.nbytes for part in parts.values())
    digest = ledger.content_digest()
    return Side(shown(checkpoint.path), checkpoint.format, spec.family, len(parts), spec.parameters(), nbytes, digest)


# --------------------------------------------------------------------------------------------- what is read, in order


@dataclass(frozen=True)
class _Pair:
    """A region to be read on one side or, in lockstep, on both; `counted` sides enter their digests."""

    name: str
    lazies: tuple[Lazy | None, Lazy | None]
    region: Box
    counted: tuple[bool, bool] = (True, True)
    surplus: bool = False


def _pairs(a: Checkpoint, b: Checkpoint) -> Iterator[_Pair]:
    for name in dict.fromkeys([*a.parts, *b.parts]):
        x, y = a.parts.get(name), b.parts.get(name)
        if x is None or y is None:
            yield from _alone(name, x, y, a, b)
        elif x.shape == y.shape:
            yield _Pair(name, (x, y), whole(x.shape))
        elif _only_rows(name, x, y):
            rows, rest = min(x.shape[0], y.shape[0]), whole(x.shape[1:])
            longer = (x, None) if x.shape[0] > rows else (None, y)
            yield _Pair(name, (x, y), ((0, rows), *rest))
            yield _Pair(name, longer, ((rows, max(x.shape[0], y.shape[0])), *rest), surplus=True)
        else:
            yield _Pair(name, (x, None), whole(x.shape))
            yield _Pair(name, (None, y), whole(y.shape))


def _alone(name: str, x: Lazy | None, y: Lazy | None, a: Checkpoint, b: Checkpoint) -> Iterator[_Pair]:
    """A part that only one side has; a head is compared with the embedding that takes its place."""
    one, other = (x, b) if x is not None else (y, a)
    assert one is not None
    stand_in = other.parts["embed"] if _tied(name, a, b) else None
    if stand_in is None or stand_in.shape != one.shape:
        yield _Pair(name, (x, y), whole(one.shape))
    elif x is not None:
        yield _Pair(name, (x, stand_in), whole(one.shape), (True, False))
    else:
        yield _Pair(name, (stand_in, y), whole(one.shape), (False, True))


def _tied(name: str, a: Checkpoint, b: Checkpoint) -> bool:
    return name == "lm_head" and a.spec.tied != b.spec.tied


def _only_rows(name: str, x: Lazy, y: Lazy) -> bool:
    """Whether two shapes differ just in the size of the vocabulary."""
    return layout(name)[:1] == (("v",),) and x.shape[1:] == y.shape[1:]


def _kinds(pair: _Pair) -> tuple[str, str]:
    x, y = pair.lazies
    assert x is not None and y is not None
    return x.dtype, y.dtype


Block = tuple[_Pair, Box, tuple["torch.Tensor | None", "torch.Tensor | None"]]


def _blocks(pairs: list[_Pair], max_memory: int) -> Iterator[Callable[[], Block]]:
    for pair in pairs:
        both = [t for t in pair.lazies if t is not None]
        item = max(ITEMSIZE[t.dtype] for t in both)
        limit = block_size(max_memory) // len(both)
        if any(isinstance(n, Map) and n.whole for t in both for n in walk(t)):
            limit = max(limit, *(t.nbytes for t in both))  # what is computed as a whole is computed once
        shape = tuple(stop - start for start, stop in pair.region)
        for part in boxes(shape, item, limit):
            box = tuple((p + start, q + start) for (p, q), (start, _) in zip(part, pair.region, strict=True))
            yield partial(_read, pair, box)


def _read(pair: _Pair, box: Box) -> Block:
    x, y = (None if t is None else t.read(box) for t in pair.lazies)
    return pair, box, (x, y)


# ------------------------------------------------------------------------------------------------------- what is said


def _part(name: str, a: Checkpoint, b: Checkpoint, values: Values | None, odd_rows: bool) -> Part | None:
    """The difference of a part, None if there is none."""
    x, y = a.parts.get(name), b.parts.get(name)
    if x is None or y is None:
        one, other = (x, b) if x is not None else (y, a)
        assert one is not None
        tied = _tied(name, a, b) and other.parts["embed"].shape == one.shape
        kinds = (one.dtype, other.parts["embed"].dtype) if tied and one.dtype != other.parts["embed"].dtype else None
        return Part(name, "a" if x is None else "b", tied, None, kinds, values)
    kinds = (x.dtype, y.dtype) if x.dtype != y.dtype else None
    surplus = shapes = None
    if x.shape != y.shape and _only_rows(name, x, y):
        surplus = _surplus(a, b, x.shape[0], y.shape[0], not odd_rows)
    elif x.shape != y.shape:
        shapes = x.shape, y.shape
    found = Part(name, "", False, shapes, kinds, values, surplus)
    return None if found == Part(name) else found


def _surplus(a: Checkpoint, b: Checkpoint, rows_a: int, rows_b: int, zeros: bool) -> Surplus:
    known = [n for c in (a, b) for n in (c.spec.true_vocab, c.tokenizer.vocab_size if c.tokenizer else None) if n]
    start, stop = sorted((rows_a, rows_b))
    harmless = zeros or (bool(known) and max(known) <= start)
    return Surplus("a" if rows_a > rows_b else "b", start, stop, zeros, harmless)


def _remarks(a: Checkpoint, b: Checkpoint) -> tuple[Remark, ...]:
    """The notes of both readings, but those that cannot make a difference: the same ones, on the same config."""
    alike = (a.format, a.config) == (b.format, b.config)
    out = []
    for note in dict.fromkeys([*a.notes, *b.notes]):
        side = "both" if note in a.notes and note in b.notes else "a" if note in a.notes else "b"
        if side != "both" or not alike:
            out.append(Remark(side, note, isinstance(note, Unknown)))
    return tuple(out)
