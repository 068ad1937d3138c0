"""The proof: source and result run on the same tokens, and what lies between their logits.

    proof = prove(source, result, claim, 256, memory=1 << 28)
    proof.verdict            # "exact", "exact up to bf16 ties", "not preserving, as asked" ...

In fp32 an exact upcycling differs by the order of sums (about 1e-4); 1e-3 is the limit.  In a 16-bit dtype the dense
model itself differs from its fp32 logits: that is the noise floor, beside which the result is shown.  There, experts of
a virtual group may tie with those of another, so that incomplete groups are chosen; they are counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from surgery.containers.text import finite
from surgery.errors import MismatchError, UsageError
from surgery.formats.base import Checkpoint
from surgery.formats.operations import with_rows
from surgery.model.spec import Spec
from surgery.running.before_head import before_head, room_for
from surgery.running.device import CPU, Device
from surgery.running.layerwise import Route, bytes_of_a_pass
from surgery.running.tokens import prose_tokens
from surgery.upcycling.distance import Distance, distance

LIMIT = 1e-3  # of max |difference| of logits in fp32
NARROW = ("bfloat16", "float16")
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}


@dataclass(frozen=True)
class Claim:
    """What an operation promises; `prove` checks it.

    spec     of the result                         exact    it computes the same function
    rounds   but for rounding its weights          group    runs of so many experts are chosen together
    intact   measures the share of neurons that are the source's own
    """

    name: str
    spec: Spec
    exact: bool
    rounds: bool = False
    group: int = 1
    intact: Callable[[Checkpoint], float] | None = None


def refuse_losses(losses: Sequence[str], allowed: bool) -> None:
    """Raise UsageError for what changes the function, unless that is allowed."""
    if losses and not allowed:
        raise UsageError(
            f"the result would compute another function: {'; '.join(losses)}",
            hint="--force-lossy allows it; the proof then says how far apart they are",
        )


class Made(Protocol):
    """A checkpoint that was made of others (`models`), before it is written."""

    @property
    def checkpoint(self) -> Checkpoint: ...
    @property
    def models(self) -> Sequence[Checkpoint]: ...
    @property
    def family(self) -> str:
        """As which family of Hugging Face's it has to be written; "": any that holds it."""

    def claim(self) -> Claim: ...
    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Ties:
    """Of all choices (a token in a layer): in how many the last chosen and the first left out tie, and in how many a
    virtual group was chosen in part."""

    choices: int
    tied: int
    incomplete: int


@dataclass(frozen=True)
class Proof:
    """What was measured.

    fp32      result against source, both in fp32          stored   the same in the dtype of the weights
    floor     source in the dtype of the weights against source in fp32: its own rounding
    ties      in the dtype of the weights                  intact   share of neurons that are the source's
    promised  whether the strategy is exact                text     what the tokens are
    """

    verdict: str
    promised: bool
    tokens: int
    text: str
    dtype: str
    fp32: Distance
    stored: Distance | None
    floor: Distance | None
    ties: Ties
    intact: float | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = finite(asdict(self))
        return out


def bytes_to_read(source: Checkpoint, result: Checkpoint) -> int:
    """What a proof tells its device's `advance` in all: every pass, and the source's head for its own rounding."""
    once = bytes_of_a_pass(source) + bytes_of_a_pass(result)
    head = source.parts["embed" if source.spec.tied else "lm_head"].nbytes
    return 2 * (once + head) if source.dtype in NARROW else once


def room_of_proof(source: Checkpoint, result: Checkpoint, tokens: int, memory: int) -> int:
    """What a block of a proof may take, in bytes.  Raises UsageError as `room_for`, and says how many tokens fit."""
    return room_for((source, result), tokens, memory, f"the proof on {tokens:,} tokens", "--verify-tokens {}")


def prove(
    source: Checkpoint, result: Checkpoint, claim: Claim, count: int = 256, on: Device = CPU, *, memory: int
) -> Proof:
    """Measure, within `memory` bytes.  `result` is what was written, opened; `claim` says what should be in it.

    Raises MismatchError if the strategy is exact and the result is not.
    """
    began = time.monotonic()
    tokens, text = prose_tokens(source, count)
    room = room_of_proof(source, result, tokens.numel(), memory)
    dense, moe, dtype = source, _same_rows(result, claim), source.dtype
    wide, run = (before_head(model, tokens, "float32", on, room=room) for model in (dense, moe))
    fp32 = distance(run, wide, tokens, room)
    stored = floor = None
    if dtype in NARROW:
        narrow = before_head(dense, tokens, dtype, on, room=room)
        floor = distance(narrow, wide, tokens, room)
        run = before_head(moe, tokens, dtype, on, room=room)
        stored = distance(run, narrow, tokens, room)
    ties = _ties(run.routes, claim)
    intact = claim.intact(moe) if claim.intact else None
    proof = Proof("", claim.exact, tokens.numel(), text, dtype, fp32, stored, floor, ties, intact,
                  time.monotonic() - began)  # fmt: skip
    return replace(proof, verdict=_verdict(proof, claim))


def _verdict(proof: Proof, claim: Claim) -> str:
    name = SHORT.get(proof.dtype, proof.dtype)
    if proof.fp32.max_diff <= LIMIT:
        return f"exact up to {name} ties" if proof.stored and proof.ties.incomplete else "exact"
    if not claim.exact:
        return "not preserving, as asked"
    if proof.floor and claim.rounds and proof.fp32.kl <= 2 * proof.floor.kl:
        return f"exact up to rounding to {name}"
    raise MismatchError(
        f"{claim.name} should preserve the function, but the logits differ by {proof.fp32.max_diff:.3g}"
        f" (KL {proof.fp32.kl:.3g}) in fp32",
        hint="this is a mistake in surgery; the output was not published",
    )


def _same_rows(result: Checkpoint, claim: Claim) -> Checkpoint:
    """The result as the planned model: rows that a format pads its vocabulary with are left out."""
    return replace(with_rows(result, min(claim.spec.vocab, result.spec.vocab)), spec=claim.spec)


def _ties(routes: Mapping[int, Route], claim: Claim) -> Ties:
    g, k = claim.group, claim.spec.top_k
    choices = tied = incomplete = 0
    for route in routes.values():
        choices += len(route.chosen)
        if k < route.logits.shape[1]:
            best = route.logits.topk(k + 1, -1).values
            tied += int((best[:, k - 1] == best[:, k]).sum())
        if g > 1:
            hits = (route.chosen // g).sort(-1).values.unflatten(-1, (-1, g)) if k % g == 0 else None
            incomplete += len(route.chosen) if hits is None else int((hits[..., :1] != hits).any(-1).any(-1).sum())
    return Ties(choices, tied, incomplete)
