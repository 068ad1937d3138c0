"""What a comparison of two checkpoints found: sides, parts and fields that differ, what is not known, and the verdict.

    found = verify("A", "B")
    found.same, found.verdict            # False, "different: 1 part"
    Verified(found, compare_logits("A", "B")).verdict

"The same model" is said only where all that differs is understood: what a reader did not understand on one side makes
the verdict "not known to be the same model", and what it had to guess is part of the sentence.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from surgery.errors import printable, some
from surgery.tensors.lazy import Shape
from surgery.verification.configs import Field
from surgery.verification.report import LogitReport
from surgery.verification.values import Values


@dataclass(frozen=True)
class Side:
    """One of the two checkpoints."""

    path: str
    format: str
    family: str
    parts: int
    parameters: int
    bytes: int
    digest: str


@dataclass(frozen=True)
class Surplus:
    """Rows of the vocabulary that only one side (`a` or `b`) has.

    `harmless`: all zeros, or behind the last token that a tokenizer or config knows of.
    """

    side: str
    start: int
    stop: int
    zeros: bool
    harmless: bool

    @property
    def text(self) -> str:
        kind = "zeros" if self.zeros else "padding behind the last token" if self.harmless else "not zeros"
        return f"{self.side.upper()} alone has rows {self.start} to {self.stop - 1} ({kind})"


@dataclass(frozen=True)
class Part:
    """How a part differs: missing on a `missing` side, by shape, dtype, values, or surplus rows.

    `tied`: it is missing on a side because that side's embedding serves as its head; `values` is then how the two
    compare.
    """

    name: str
    missing: str = ""
    tied: bool = False
    shapes: tuple[Shape, Shape] | None = None
    kinds: tuple[str, str] | None = None
    values: Values | None = None
    surplus: Surplus | None = None

    @property
    def changes(self) -> bool:
        """Whether the values differ, rather than only how they are stored."""
        lost = bool(self.missing) and not self.tied
        wrong_rows = self.surplus is not None and not self.surplus.harmless
        return lost or self.shapes is not None or self.values is not None or wrong_rows

    @property
    def text(self) -> str:
        """One line for people."""
        said = []
        if self.tied:
            said.append(f"{self.missing.upper()} has none, its embedding serves as one")
        elif self.missing:
            said.append(f"missing in {self.missing.upper()}")
        if self.shapes:
            said.append(f"shape {list(self.shapes[0])} and {list(self.shapes[1])}")
        if self.kinds:
            said.append(f"{self.kinds[0]} and {self.kinds[1]}")
            if self.values is None and not self.missing:
                said.append("all values are equal")
        if self.surplus:
            said.append(self.surplus.text)
        if self.values:
            said.append(self.values.text)
        return f"{self.name}: {', '.join(said)}"


@dataclass(frozen=True)
class Remark:
    """A note on how one side (`a` or `b`), or each of them (`both`), was read.

    `unknown`: something there was not understood, so that nobody knows whether the model depends on it.
    """

    side: str
    note: str
    unknown: bool

    @property
    def text(self) -> str:
        """One line for people."""
        return f"{'A and B' if self.side == 'both' else self.side.upper()}: {printable(self.note)}"


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.  `parts` and `fields` hold only what differs, `remarks` what the verdict rests on."""

    a: Side
    b: Side
    parts: tuple[Part, ...]
    fields: tuple[Field, ...]
    remarks: tuple[Remark, ...] = ()

    @property
    def same_weights(self) -> bool:
        """Whether every value is the same (dtypes and padding may differ)."""
        return not any(part.changes for part in self.parts)

    @property
    def same(self) -> bool:
        """Whether the two are the same model: same values and dtypes, and nothing that changes the function, or may."""
        return self.alike and not any(remark.unknown for remark in self.remarks)

    @property
    def alike(self) -> bool:
        """Whether all that is understood is the same."""
        return self.same_weights and not any(f.function for f in self.fields) and not self._kinds()

    def _kinds(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys(p.kinds for p in self.parts if p.kinds))

    @property
    def verdict(self) -> str:
        """The answer in one sentence."""
        config = some([f.name for f in self.fields if f.function])
        kinds = some([f"{a} and {b}" for a, b in self._kinds()])
        serious = [p for p in self.parts if p.changes]
        if serious and all(p.values is not None and p.values.rounded and not p.shapes for p in serious):
            return f"the same weights but for rounding: {kinds}" + (f"; different config: {config}" if config else "")
        if serious:
            parts = f"{len(serious)} part{'s' if len(serious) > 1 else ''}"
            return f"different: {parts}" + (f", and the config: {config}" if config else "")
        if config:
            return f"same weights, different config: {config}" + (f"; different dtype: {kinds}" if kinds else "")
        if kinds:
            return f"same weights, different dtype: {kinds}"
        if unknown := [r.text for r in self.remarks if r.unknown]:
            return f"same weights, but not known to be the same model: {some(unknown, 2)}"
        stored = ["padding of the vocabulary"] if any(p.surplus for p in self.parts) else []
        stored += ["one of them tied"] if any(p.tied for p in self.parts) else []
        said = f" (stored differently: {' and '.join(stored)})" if stored else ""
        return f"the same model{said}" + (f", if it was read rightly: {self._guesses}" if self.remarks else "")

    @property
    def _guesses(self) -> str:
        return some([remark.text for remark in self.remarks], 2)

    def to_json(self) -> dict[str, Any]:
        """Plain data: the verdict, both digests, every difference with its line of text."""
        return {
            "same": self.same,
            "verdict": self.verdict,
            "same_weights": self.same_weights,
            "a": asdict(self.a),
            "b": asdict(self.b),
            "parts": [{**asdict(p), "changes": p.changes, "text": p.text} for p in self.parts],
            "config": [{**asdict(f), "text": f.text} for f in self.fields],
            "notes": [{**asdict(r), "text": r.text} for r in self.remarks],
        }


@dataclass(frozen=True)
class Verified:
    """A comparison and, if both were run, their logits: one answer."""

    found: Comparison
    logits: LogitReport | None = None

    @property
    def same(self) -> bool:
        return self.found.same and (self.logits is None or self.logits.same)

    @property
    def verdict(self) -> str:
        """The answer in one sentence."""
        if self.logits is None or self.logits.same or not self.found.alike:
            return self.found.verdict
        return f"not the same model, though weights and configs look the same: {self.logits.verdict}"

    def to_json(self) -> dict[str, Any]:
        logits = {} if self.logits is None else {"logits": self.logits.to_json()}
        return {**self.found.to_json(), "same": self.same, "verdict": self.verdict, **logits}
