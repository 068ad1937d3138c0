"""Which experts of a mixture stay, in which order and which together: from flags or a YAML recipe.

    wanted = from_flags({"keep": ("0-3", "5:4-7"), "top_k": 2})     # layer 5 keeps others than the rest
    wanted = from_values({"merge": [[0, 1], [2, 3]], "layers": {"3-5": {"prune": [4, 5, 6, 7]}}})
    wanted.for_layer(5)                                             # Choice("keep", ((4,), (5,), (6,), (7,)))

A list of experts is written `0-3,6`; experts that are averaged are joined by `+`, as in `0+1,2+3`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from surgery.containers.text import read_yaml
from surgery.errors import ConfigError, SurgeryError, UsageError, show

HOWS = ("keep", "prune", "permute", "merge", "best")
MORE = ("duplicate", "noise", "seed", "top_k", "by", "force_lossy")
BY = ("router-norm", "weight-norm")
LARGEST = 1 << 16
Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Choice:
    """What happens to a layer's experts.

    how      keep these | prune these | permute into this order | merge: means of these | best: so many
    groups   the experts that are named, one tuple each; several in one are averaged
    count    of `best`: how many stay
    """

    how: str
    groups: Groups = ()
    count: int = 0


@dataclass(frozen=True)
class Selection:
    """What is asked of the experts of a model.

    default     for all layers that `layers` does not name; None: all experts stay
    duplicate   copies of every expert in the end, side by side
    noise       standard deviation of noise on all copies but the first, in that of the weights; `seed` decides it
    top_k       experts that a token uses from now on; None: as before, times `duplicate`
    by          what `best` goes by: router-norm | weight-norm, the largest stay
    """

    default: Choice | None = None
    layers: Mapping[int, Choice] = field(default_factory=dict)
    duplicate: int = 1
    top_k: int | None = None
    by: str = "router-norm"
    force_lossy: bool = False
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise UsageError(f"--by {show(self.by)} is unknown", hint=f"choose from {', '.join(BY)}")
        for name in ("duplicate", "top_k"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and 0 < value < LARGEST):
                raise UsageError(f"--{name.replace('_', '-')} {show(value)} is no sensible number")
        if type(self.force_lossy) is not bool:
            raise UsageError("force_lossy is true or false")
        if type(self.noise) not in (int, float) or not 0 <= self.noise <= 1e3:
            raise UsageError(f"--noise {show(self.noise)} is no share of a standard deviation", hint="--noise 0.01")
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 63:
            raise UsageError(f"--seed {show(self.seed)} is no sensible number")
        if self.noise and self.duplicate == 1:
            raise UsageError("--noise is for the copies that --duplicate makes", hint="--duplicate 2")
        if self.default is None and not self.layers and self.duplicate == 1 and self.top_k is None:
            raise UsageError(
                "nothing is asked of the experts",
                hint="--keep, --prune, --best, --merge, --permute, --duplicate or --top-k",
            )

    def for_layer(self, layer: int) -> Choice | None:
        return self.layers.get(layer, self.default)

    def to_json(self) -> dict[str, Any]:
        def said(choice: Choice) -> dict[str, Any]:
            return {choice.how: choice.count if choice.how == "best" else [list(g) for g in choice.groups]}

        return {
            **(said(self.default) if self.default else {}),
            **({"layers": {str(i): said(c) for i, c in sorted(self.layers.items())}} if self.layers else {}),
            "duplicate": self.duplicate,
            "noise": self.noise,
            "seed": self.seed,
            "top_k": self.top_k,
            "by": self.by,
            "force_lossy": self.force_lossy,
        }


def from_flags(flags: Mapping[str, Any]) -> Selection:
    """A Selection from the flags of `surgery experts`: texts, each perhaps with the layers it is for in front.

    Raises UsageError if a text cannot be read, or a layer is given two choices.
    """
    default: list[Choice] = []
    layers: dict[int, Choice] = {}
    for how in HOWS:
        for text in flags.get(how) or ():
            where, colon, rest = str(text).rpartition(":")
            choice = _choice(how, rest, f"--{how}")
            if not colon:
                default.append(choice)
                continue
            for layer in _numbers(where, f"--{how}"):
                if layer in layers:
                    raise UsageError(f"--{how} {show(text)}: layer {layer} is told two things")
                layers[layer] = choice
    if len(default) > 1:
        raise UsageError(
            f"--{default[0].how} and --{default[1].how} are both for all layers",
            hint="write LAYERS:EXPERTS for one of them, as in 3-5:0,1, or do one after the other",
        )
    more = {k: flags[k] for k in MORE if flags.get(k) is not None}
    return Selection(default[0] if default else None, layers, **more)


def selection(flags: Mapping[str, Any], recipe: str | None = None) -> Selection:
    """What is asked for; flags win over a recipe.  Raises UsageError or ConfigError."""
    if recipe is None:
        return from_flags(flags)
    base = from_recipe(read_yaml(recipe, "recipe"), recipe)
    given = {name: flags[name] for name in (*HOWS, *MORE) if flags.get(name) not in (None, (), False)}
    if not given:
        return base
    over = from_flags({"top_k": base.top_k or 1, "duplicate": base.duplicate, **given})
    values = {name: getattr(over, name) for name in MORE if name in given}
    return replace(base, default=over.default or base.default, layers={**base.layers, **over.layers}, **values)


def from_recipe(values: object, file: str) -> Selection:
    """A Selection from a YAML recipe.  Raises ConfigError for what is no field, with the one that may be meant."""
    if not isinstance(values, dict):
        raise ConfigError("is no recipe: it should map fields to values", file=file)
    try:
        return from_values(values)
    except SurgeryError as error:
        raise ConfigError(error.what, file=file, hint=error.hint) from None


def from_values(values: Mapping[Any, object]) -> Selection:
    """A Selection from numbers and lists: the flags' names, and `layers` with choices of their own.

    Raises UsageError for what is no field, with the field that may have been meant.
    """
    named = {str(k).replace("-", "_"): v for k, v in values.items()}
    _known(named, (*HOWS, "layers", *MORE))
    layers: dict[int, Choice] = {}
    given = named.get("layers") or {}
    if not isinstance(given, dict):
        raise UsageError("layers maps numbers of layers to choices")
    for where, choices in given.items():
        if not isinstance(choices, dict) or len(choices) != 1:
            raise UsageError(f"layers {show(where)} need one choice", hint=f"one of {', '.join(HOWS)}")
        _known(choices, HOWS)
        (how, value), *_ = choices.items()
        for layer in _numbers(str(where), "layers"):
            if layer in layers:
                raise UsageError(f"layer {layer} is told two things")
            layers[layer] = _choice(str(how), value, str(how))
    default = [_choice(how, named[how], how) for how in HOWS if how in named]
    if len(default) > 1:
        raise UsageError(f"{default[0].how} and {default[1].how} are both for all layers")
    more: dict[str, Any] = {k: named[k] for k in MORE if k in named}
    return Selection(default[0] if default else None, layers, **more)


def _known(values: Iterable[object], known: Sequence[str]) -> None:
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"fields: {', '.join(known)}"
            raise UsageError(f"there is no field {show(name)}", hint=hint)


def _choice(how: str, value: object, where: str) -> Choice:
    """A choice from the text of a flag, or from a number or list of a recipe."""
    if how == "best":
        text = str(value)
        if not re.fullmatch(r"[1-9]\d{0,4}", text) or type(value) is bool:
            raise UsageError(f"{where} {show(value)} is no number of experts")
        return Choice(how, count=int(text))
    groups = tuple(_groups(value, where))
    if how != "merge" and any(len(g) > 1 for g in groups):
        raise UsageError(f"{where} {show(value)}: only merge takes several experts together")
    flat = [i for g in groups for i in g]
    if len(set(flat)) != len(flat):
        raise UsageError(f"{where} {show(value)} names an expert twice", hint="duplicate copies every expert")
    return Choice(how, groups)


def _groups(value: object, where: str) -> Iterable[tuple[int, ...]]:
    items = value if isinstance(value, (list, tuple, range)) else str(value).split(",")
    if not items:
        raise UsageError(f"{where} names no expert")
    for item in items:
        if isinstance(item, (list, tuple)):
            if not item or any(type(i) is not int or not 0 <= i < LARGEST for i in item):
                raise UsageError(f"{where}: {show(str(item))} is no list of experts")
            yield tuple(item)
        elif "+" in str(item):
            yield tuple(n for text in str(item).split("+") for n in _numbers(text, where))
        else:
            yield from ((n,) for n in _numbers(str(item), where))


def _numbers(text: str, where: str) -> list[int]:
    """ "0-2,5" -> [0, 1, 2, 5]."""
    out: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", item)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise UsageError(f"{where} {show(text)} is no list of numbers", hint="write 0-3,6")
        out += range(int(match[1]), int(match[2] or match[1]) + 1)
    return out
