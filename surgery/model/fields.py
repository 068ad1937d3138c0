"""What is known of a field of `Spec` besides its value: its label, its values in words, and what depends on it.

    norm_eps: float = choice("norm eps", 1e-5)      # how Spec declares a field: no other place has to know it
    FIELDS["norm_eps"].say(1e-6)                    # "1e-06"

`name` is a field that no computation uses, `needed` and `size` are measured by the shapes of parts, `part` decides
which parts there are, and `choice` shows in the computation alone.  `used` says which models compute with the field at
all (`ffn` is idle where all layers have experts); `means` gives one value for all ways to write the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any

from surgery.errors import show

Words = Mapping[Any, str] | Callable[[Any], str]
Test = Callable[[Any], bool]  # of a Spec
KEY = "about"  # of a dataclass field's metadata
NAME, NEEDED, SIZE, PART, CHOICE = "name", "needed", "size", "part", "choice"
YES_NO: Mapping[Any, str] = {True: "yes", False: "no"}
NORMS: Mapping[Any, str] = {"rms": "RMSNorm", "layer": "LayerNorm", "layer_no_bias": "LayerNorm without biases",
                            "none": "LayerNorm without weights"}  # fmt: skip
NORM_PLACES: Mapping[Any, str] = {"pre": "before attention and mlp", "post": "after attention and mlp"}
QK_NORMS: Mapping[Any, str] = {"": "none", "head": "over each head", "full": "over all heads"}


@dataclass(frozen=True)
class Field:
    """A field of Spec.  `axis`: the letter in patterns that it measures; `counted`: what ranks share of it."""

    kind: str
    label: str
    words: Words
    used: Test | None = None  # None: by every model
    means: Callable[[Any], object] | None = None
    axis: str = ""
    counted: str = ""

    def say(self, value: object) -> str:
        """The value in words."""
        return self.words(value) if callable(self.words) else self.words.get(value, plain(value))


def name(label: str, default: object = MISSING, used: Test = lambda spec: False) -> Any:
    """A field that names something; no computation uses it, except where `used`."""
    return _declared(default, Field(NAME, label, plain, used))


def needed(label: str, axis: str = "", counted: str = "") -> Any:
    """The size of an axis that every model has: at least 1, without a default."""
    return _declared(MISSING, Field(NEEDED, label, plain, axis=axis, counted=counted))


def size(label: str, axis: str, counted: str = "", used: Test | None = None) -> Any:
    """The size of an axis that a model may have; 0 by default."""
    return _declared(0, Field(SIZE, label, plain, used, axis=axis, counted=counted))


def part(label: str, default: object, words: Words | None = None, used: Test | None = None, means: Any = None) -> Any:
    """A field that decides which parts a model has."""
    return _declared(default, Field(PART, label, words or _usual(default), used, means))


def choice(label: str, default: object, words: Words | None = None, used: Test | None = None, means: Any = None) -> Any:
    """A field that changes what is computed, but no part."""
    return _declared(default, Field(CHOICE, label, words or _usual(default), used, means))


def _declared(default: object, about: Field) -> Any:
    return dataclasses.field(default=default, metadata={KEY: about})


def _usual(default: object) -> Words:
    return YES_NO if isinstance(default, bool) else plain


def plain(value: object) -> str:
    """A number or text as it is."""
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value) if isinstance(value, (int, str)) else show(value)


def window_words(windows: Sequence[int]) -> str:
    """(9, 9, 0) -> "9 in 2 of 3 layers"."""
    inside = [w for w in windows if w]
    widths = " and ".join(str(w) for w in sorted(set(inside)))
    return f"{widths} in {len(inside)} of {len(windows)} layers" if inside else "none"


def layer_words(layers: Sequence[int]) -> str:
    """(0, 2, 3, 4) -> "0, 2 to 4"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "all"
