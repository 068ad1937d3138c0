"""Which experts of a mixture stay, in which order and which together: from flags or a YAML recipe.

    wanted = from_flags({"keep": ("0-3", "5:4-7"), "top_k": 2})     # layer 5 keeps others than the rest
    wanted = from_recipe({"merge": [[0, 1], [2, 3]], "layers": {"3-5": {"prune": [4, 5, 6, 7]}}}, "experts.yaml")
    wanted.for_layer(5)                                             # Choice("prune", ((4,), (5,), (6,), (7,)))

A list of experts is written `0-3,6`; experts that are averaged are joined by `+`, as in `0+1,2+3`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from surgery.errors import UsageError, show, suggest
from surgery.settings import Checked, in_file, keywords, read, setting

HOWS = ("keep", "prune", "permute", "merge", "best")
LARGEST = (1 << 16) - 1
WHICH = "[LAYERS:]E,E"
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


@dataclass(frozen=True, kw_only=True)
class ForAll(Checked):
    """What is asked of all layers alike."""

    duplicate: int = setting(
        1, "Every expert so many times in the end, and as many times more of them chosen: exact, a larger model to "
        "train on.", metavar="TIMES", low=1, high=LARGEST,
    )  # fmt: skip
    top_k: int | None = setting(
        None, "How many experts a token uses.", low=1, high=LARGEST, otherwise="as before, times --duplicate"
    )
    by: str = setting(
        "router-norm", "What --best goes by: rows of the router, or the experts' own weights.",
        choices=("router-norm", "weight-norm"),
    )  # fmt: skip
    noise: float = setting(
        0.0, "duplicate: noise on all copies but the first, in standard deviations of their own weights (lossy).",
        metavar="STD", low=0, high=1e3, otherwise="0",
    )  # fmt: skip
    seed: int = setting(0, "Of the noise.", low=0)
    force_lossy: bool = setting(False, "Allow what does not preserve the function.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise and self.duplicate == 1:
            raise UsageError("--noise is for the copies that --duplicate makes", hint="--duplicate 2")


@dataclass(frozen=True, kw_only=True)
class Choices(ForAll):
    """What is asked, as recipes and calls say it: lists of experts, or texts like `0-3,6`; `layers` have their own."""

    keep: Any = setting(
        None, "Only these experts, in this order: 0,3-5; with layers in front (3-5:0,1) in these layers. Repeatable.",
        metavar=WHICH, many=True,
    )  # fmt: skip
    prune: Any = setting(None, "All but these. Repeatable.", metavar=WHICH, many=True)
    best: Any = setting(None, "The N experts of largest norm (--by). Repeatable.", metavar="[LAYERS:]N", many=True)
    merge: Any = setting(
        None, "Means of experts: 0+1,2+3 makes two of four. Repeatable.", metavar="[LAYERS:]E+E,E", many=True
    )
    permute: Any = setting(None, "All experts in another order: exact. Repeatable.", metavar=WHICH, many=True)
    layers: Any = setting(None, "By layers, as 3-5: a choice of their own.")


@dataclass(frozen=True, kw_only=True)
class Selection(ForAll):
    """The same layer by layer.  `default` is for all that `layers` does not name; None: all experts stay."""

    default: Choice | None = None
    layers: Mapping[int, Choice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
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
            **{f.name: getattr(self, f.name) for f in fields(ForAll)},
        }


def selected(asked: Choices) -> Selection:
    """The choice of every layer.  Raises UsageError for what cannot be read, or says two things of a layer."""
    default = [_choice(how, value, how) for how in HOWS if (value := getattr(asked, how)) is not None]
    if len(default) > 1:
        raise UsageError(
            f"{default[0].how} and {default[1].how} are both for all layers",
            hint="write LAYERS:EXPERTS for one of them, as in 3-5:0,1, or do one after the other",
        )
    layers = {}
    for layer, choices in by_layer(asked.layers).items():
        if not isinstance(choices, Mapping) or len(choices) != 1:
            raise UsageError(f"layer {layer} needs one choice", hint=f"one of {', '.join(HOWS)}")
        (how, value), *_ = choices.items()
        if how not in HOWS:
            raise UsageError(f"there is no field {show(how)}", hint=suggest(how, HOWS, "fields"))
        layers[layer] = _choice(how, value, how)
    more = {f.name: getattr(asked, f.name) for f in fields(ForAll)}
    return Selection(default=default[0] if default else None, layers=layers, **more)


def by_layer(layers: Any) -> dict[int, Any]:
    """{"3-4": x} -> {3: x, 4: x}."""
    if not isinstance(layers or {}, Mapping):
        raise UsageError("layers maps numbers of layers to choices")
    out: dict[int, Any] = {}
    for where, value in (layers or {}).items():
        for layer in _numbers(str(where), "layers"):
            if layer in out:
                raise UsageError(f"layer {layer} is told two things")
            out[layer] = value
    return out


def from_flags(flags: Mapping[str, Any]) -> Selection:
    """A Selection from the flags of `surgery experts`: texts, each perhaps with the layers it is for in front."""
    return selected(Choices(**unfolded(flags)))


def from_recipe(values: object, file: str) -> Selection:
    """A Selection from a YAML recipe.  Raises ConfigError for what is no field, with the one that may be meant."""
    asked = read(Choices, values, file)
    with in_file(file):
        return selected(asked)


def unfolded(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags as a recipe says the same: {"keep": ("0-3", "5:4-7")} -> {"keep": "0-3", "layers": {5: {"keep": "4-7"}}}.

    Raises UsageError if they say two things of a layer.
    """
    out: dict[str, Any] = {name: value for name, value in flags.items() if name not in HOWS}
    layers: dict[int, Any] = {}
    for how in HOWS:
        for text in flags.get(how) or ():
            where, colon, rest = str(text).rpartition(":")
            if not colon:
                if how in out:
                    raise UsageError(f"--{how} and --{how} are both for all layers")
                out[how] = rest
            for layer in _numbers(where, f"--{how}") if colon else ():
                if layer in layers:
                    raise UsageError(f"--{how} {show(text)}: layer {layer} is told two things")
                layers[layer] = {how: rest}
    return {**out, "layers": layers} if layers else out


def asked_for(flags: Mapping[str, Any], recipe: object = None, file: str | None = None) -> dict[str, Any]:
    """The fields of `Choices` that flags and a recipe give; flags win, layer by layer.

    Raises UsageError or, for the recipe, ConfigError.
    """
    own = unfolded(flags)
    if file is None:
        return own
    base = keywords(Choices, recipe, file)
    if any(how in own for how in HOWS):
        base = {name: value for name, value in base.items() if name not in HOWS}
    layers = {**by_layer(base.get("layers")), **own.get("layers", {})}
    return {**base, **own, **({"layers": layers} if layers else {})}


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
