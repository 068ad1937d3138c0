"""Amounts and rates as a run's YAML says them: 1000 (steps), "50B tokens", "10%".

parse_amount("2.5B tokens")             # Amount(2.5e9, "tokens")
parse_amount(100).steps(tokens_to_steps, total=2000)            # 100
parse_rate("10%").of(3e-4)              # 3e-05
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from surgery.data.strict import parse_count

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_AMOUNT = re.compile(r"(\d{1,15}(?:\.\d{1,9})?(?:e\d{1,2})?)\s*([kMBT]?)\s*(steps|tokens|%|)")


@dataclass(frozen=True)
class Amount:
    """So many steps or tokens, or a share (0 to 1) of the whole run."""

    value: float
    unit: str

    def steps(self, of_tokens: Callable[[float], int], total: int) -> int:
        """In steps; `of_tokens` says how many steps see so many tokens."""
        if self.unit == "tokens":
            return of_tokens(self.value)
        return round(self.value * total) if self.unit == "share" else int(self.value)

    def __str__(self) -> str:
        number = f"{self.value * (100 if self.unit == 'share' else 1):.12g}"
        return f"{number}%" if self.unit == "share" else f"{number} {self.unit}"


def parse_amount(value: Any) -> Any:
    """Steps where no unit is said."""
    if isinstance(value, Amount):
        return value
    match = _AMOUNT.fullmatch(str(value)) if type(value) in (int, float, str) else None
    if match is None:
        raise ValueError(f"{value!r} is no amount: write 1000 (steps), '50B tokens' or '10%'")
    number, unit = float(match[1]) * _UNITS[match[2]], match[3] or "steps"
    if unit == "%":
        return Amount(number / 100, "share")
    if number != int(number):
        raise ValueError(f"{value!r} is no whole number of {unit}")
    return Amount(number, unit)


@dataclass(frozen=True)
class Rate:
    """A learning rate, or a share of the peak's."""

    value: float
    of_peak: bool = False

    def of(self, peak: float) -> float:
        return self.value * peak if self.of_peak else self.value

    def plain(self) -> float | str:
        """As YAML says it."""
        return f"{self.value * 100:.12g}%" if self.of_peak else self.value


def parse_rate(value: Any) -> Any:
    if isinstance(value, Rate):
        return value
    if isinstance(value, str) and (match := re.fullmatch(r"(\d{1,3}(?:\.\d{1,9})?)%", value)):
        return Rate(float(match[1]) / 100, True)
    if type(value) not in (int, float) or not 0 <= value < 10:
        raise ValueError(f"{value!r} is no learning rate: write 3e-5, or '10%' of the peak")
    return Rate(float(value))


def parse_by_tokens(value: Any) -> Any:
    """A number, or what it is from which token on: {0: 1M, 2B: 4M}; a number alone becomes {0: number}."""
    pairs = value.items() if isinstance(value, dict) else [(0, value)]
    found = {0 if start == "0" else parse_count(start): parse_count(n) for start, n in pairs}
    if not all(type(n) is int and n >= 0 for n in found) or not all(type(n) is int and n > 0 for n in found.values()):
        raise ValueError(
            f"{value!r} is neither a number nor numbers by the token from which they hold: {{0: 1M, 2B: 4M}}"
        )
    if 0 not in found:
        raise ValueError(f"{value!r} does not say what holds from token 0 on")
    return dict(sorted(found.items()))


def plain_by_tokens(value: dict[int, int]) -> int | dict[str, int]:
    """As YAML says it."""
    return value[0] if len(value) == 1 else {str(start): n for start, n in value.items()}


_TEXT = WithJsonSchema({"type": ["number", "string"]})
Duration = Annotated[Amount, BeforeValidator(parse_amount), PlainSerializer(str), _TEXT]
ByTokens = Annotated[
    dict[int, int], BeforeValidator(parse_by_tokens), PlainSerializer(plain_by_tokens),
    WithJsonSchema({"type": ["number", "string", "object"]}),
]  # fmt: skip
LearningRate = Annotated[Rate, BeforeValidator(parse_rate), PlainSerializer(Rate.plain), _TEXT]
