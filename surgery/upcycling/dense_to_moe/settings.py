"""What can be asked of an upcycling, as one frozen record; flags and YAML recipes have the same fields.

    Settings(experts=64, top_k=8, target="mixtral")
    from_recipe({"experts": 64, "top_k": 8, "shared": 0.5}, "recipe.yaml")

Values are checked here, one by one; what they mean together is `resolve`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from surgery.errors import ConfigError, SurgeryError, UsageError, show

STRATEGIES = ("auto", "copy", "virtual-group", "partition", "drop", "mix")
SCALES = ("auto", "down", "up-down", "router", "cbrt", "none")
ORDERS = ("sequential", "random", "clustering", "clustering-up", "co-activation", "gradient")
ROUTERS = ("normal", "kaiming", "zeros", "kmeans", "prompts", "domains")
LARGEST = 1 << 16


@dataclass(frozen=True)
class Settings:
    """One upcycling.

    experts, top_k   how many there are, and how many of them a token uses
    strategy         which neurons each expert starts with; auto: virtual-group if possible, else copy
    granularity      into how many shards each copy of the mlp is cut (virtual-group); None: top_k
    target           the family of the result; auto: the first that can hold it exactly
    router           normal[:STD] | kaiming | zeros | kmeans[:STD] | prompts:FILE | domains:FILE
    scale            where the factor goes that makes up for the shards: down | up-down | router | cbrt | none | NUMBER
    shared           neurons of an expert that is always on: a share below 1, a number, or "dense" for a whole copy
    order            which neurons go together: sequential, random, clustering, clustering-up, co-activation or gradient
    sharing    order gradient: every expert takes its best neurons, whether others have them or not
    text             what the model is run on, where the order or the router needs that; "": some prose
    text_tokens   how much of it
    dense_layers     layers that keep their dense mlp; negative ones count from the end
    normalise        the chosen experts' weights are divided by their sum (False: softmax, then top-k)
    reinit           share of an expert's neurons that are drawn anew (drop)
    reinit_indices   shared: the same neurons in gate, up and down | independent: others in each
    noise            standard deviation of noise on the experts, in that of the weights themselves
    sources          further dense models of the same shape, whose experts are mixed in (mix)
    attention        of a mix: average | first
    force_lossy      allow what does not preserve the function
    """

    experts: int
    top_k: int
    strategy: str = "auto"
    granularity: int | None = None
    target: str = "auto"
    router: str = "normal:0.02"
    scale: str = "auto"
    shared: str = "0"
    order: str = "sequential"
    sharing: bool = False
    text: str = ""
    text_tokens: int = 1024
    dense_layers: tuple[int, ...] = ()
    normalise: bool = True
    reinit: float = 0.5
    reinit_indices: str = "shared"
    noise: float = 0.0
    sources: tuple[str, ...] = ()
    attention: str = "average"
    seed: int = 0
    force_lossy: bool = False

    def __post_init__(self) -> None:
        for name in ("experts", "top_k", "granularity", "seed", "text_tokens"):
            value = getattr(self, name)
            low = 0 if name == "seed" else 1
            if (name, value) != ("granularity", None):
                _check(type(value) is int and low <= value < (1 << 63 if name == "seed" else LARGEST), name, value)
        for name in ("reinit", "noise"):
            value = getattr(self, name)
            _check(type(value) in (int, float) and 0 <= value <= (1 if name == "reinit" else 1e3), name, value)
        for name, choices in CHOICES.items():
            _one_of(getattr(self, name), choices, name)
        for name in ("normalise", "force_lossy", "sharing"):
            _check(type(getattr(self, name)) is bool, name, getattr(self, name))
        for name, kind in (("dense_layers", int), ("sources", str)):
            value = getattr(self, name)
            _check(isinstance(value, tuple) and all(type(x) is kind for x in value), name, value)
        _check(isinstance(self.target, str), "target", self.target)
        _check(isinstance(self.text, str), "text", self.text)
        _one_of(self.router_kind[0], ROUTERS, "router")
        if self.scale not in SCALES and self.scale_number is None:
            _one_of(self.scale, SCALES, "scale")
        if self.shared != "dense" and not _number(self.shared, 0, 1 << 31):
            _check(False, "shared", self.shared)

    @property
    def router_kind(self) -> tuple[str, str]:
        """ "normal:0.02" -> ("normal", "0.02")."""
        _check(isinstance(self.router, str), "router", self.router)
        name, _, rest = self.router.partition(":")
        return name, rest

    @property
    def scale_number(self) -> float | None:
        return float(self.scale) if _number(self.scale, 0, 1e6) else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


CHOICES: Mapping[str, Sequence[str]] = {
    "strategy": STRATEGIES,
    "order": ORDERS,
    "reinit_indices": ("shared", "independent"),
    "attention": ("average", "first"),
}


def _number(text: object, low: float, high: float) -> bool:
    try:
        return isinstance(text, str) and low <= float(text) < high
    except ValueError:
        return False


def _check(fine: bool, name: str, value: object) -> None:
    if not fine:
        raise UsageError(f"{flag(name)} {show(value)} makes no sense", hint="surgery upcycle --help explains each")


def _one_of(value: object, choices: Sequence[str], name: str) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1)
        guess = f"did you mean {near[0]}?" if near else f"choose from {', '.join(choices)}"
        raise UsageError(f"{flag(name)} {show(value)} is unknown", hint=guess)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def from_recipe(values: object, file: str) -> dict[str, Any]:
    """The fields of a YAML recipe as keywords of Settings, lists as tuples.

    Raises ConfigError for what is no field, with the field that may have been meant.
    """
    known = [f.name for f in fields(Settings)]
    if not isinstance(values, dict):
        raise ConfigError("is no recipe: it should map fields to values", file=file, hint=f"fields: {', '.join(known)}")
    out: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            guess = f"did you mean {near[0]}?" if near else f"fields: {', '.join(known)}"
            raise ConfigError(f"there is no field {show(key)}", file=file, hint=guess)
        if name in ("router", "scale", "shared") and type(value) in (int, float):
            value = repr(value)
        if name in ("reinit", "noise") and type(value) is int:
            value = float(value)
        out[name] = tuple(value) if isinstance(value, list) else value
    return out


def settled(values: Mapping[str, Any], file: str | None = None) -> Settings:
    """Settings from keywords.  Raises UsageError (ConfigError of `file`) if one is missing or makes no sense."""
    known = [f.name for f in fields(Settings)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise UsageError(f"there is no setting {show(name)}", hint=f"did you mean {near[0]}?" if near else None)
    for name in ("experts", "top_k"):
        if values.get(name) is None:
            raise UsageError(f"{flag(name)} is missing", hint="for example --experts 8 --top-k 2")
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    try:
        return Settings(**plain)
    except SurgeryError as error:
        if file is None:
            raise
        raise ConfigError(error.what, file=file, hint=error.hint) from None
