"""What can be asked of an upcycling, as one frozen record: the flags of `surgery upcycle`, the fields of its recipes.

    Settings(experts=64, top_k=8, target="mixtral")
    read(Settings, {"experts": 64, "top_k": 8, "shared": 0.5}, "recipe.yaml")

Values are checked here, one by one; what they mean together is `resolve`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from surgery.errors import UsageError, show, suggest
from surgery.settings import Checked, about, flag, setting

STRATEGIES = ("auto", "copy", "virtual-group", "partition", "drop", "mix")
SCALES = ("auto", "down", "up-down", "router", "cbrt", "none")
ORDERS = ("sequential", "random", "clustering", "clustering-up", "co-activation", "gradient")
ROUTERS = ("normal", "kaiming", "zeros", "kmeans", "prompts", "domains")
LARGEST = (1 << 16) - 1
NEEDED = ("experts", "top_k")  # of a mixture in the mlp
COMMON = ("attention_experts", "attention_top_k", "seed", "force_lossy")  # settings that are for attention experts, too


@dataclass(frozen=True)
class Settings(Checked):
    """One upcycling."""

    experts: int = setting(0, "How many experts each layer gets.", low=0, high=LARGEST, otherwise="none")
    top_k: int = setting(0, "How many of them a token uses.", low=0, high=LARGEST, otherwise="none")
    strategy: str = setting(
        "auto", "copy: whole copies of the mlp. virtual-group: copies cut into shards that are chosen together. "
        "partition: one mlp cut up (lossy). drop: copies, partly drawn anew (lossy). mix: experts from several models "
        "(lossy).", metavar="NAME", choices=STRATEGIES,
        otherwise="virtual-group if top-k divides the mlp's width and the experts, else copy",
    )  # fmt: skip
    granularity: int | None = setting(
        None, "Shards per copy of the mlp (virtual-group); divides experts, top-k and the mlp's width.", metavar="G",
        low=1, high=LARGEST, otherwise="top-k",
    )  # fmt: skip
    target: str = setting(
        "auto", "The family of the result: mixtral, granitemoeshared, granitemoe, qwen2_moe, qwen3_moe, flex_olmo, "
        "olmoe, glm4_moe, ernie4_5_moe.", metavar="FAMILY", otherwise="the first that holds the model exactly",
    )  # fmt: skip
    router: str = setting(
        "normal:0.02", "What the router starts from: normal[:STD], kaiming, zeros (all experts tie), kmeans[:STD] "
        "(centres of what the router sees on a text), prompts:YAML (examples per expert, as in mergekit), domains:YAML "
        "(a text per expert). Experts of a virtual group share their rows.", metavar="START",
    )  # fmt: skip
    scale: str = setting(
        "auto", "Where the factor G goes that makes up for the shards: down, up-down, router (a factor of the config), "
        "cbrt (on gate, up and down: published, not preserving), none, or a NUMBER on down.", metavar="WHERE",
        otherwise="down",
    )  # fmt: skip
    shared: str = setting(
        "0", "An expert that is always on (shared, or residual): a share of the mlp (0.5, 50%), N-experts (as wide as "
        "N of the others), N-neurons, or dense for the whole mlp beside experts that add nothing at first.",
        metavar="WIDTH",
    )  # fmt: skip
    order: str = setting(
        "sequential", "Which neurons go together: sequential, random, clustering (of the rows of gate; clustering-up: "
        "of up), co-activation or gradient (these two run the model on a text).", metavar="ORDER", choices=ORDERS,
    )  # fmt: skip
    sharing: bool = setting(False, "order gradient: every expert takes its best neurons, whether others have them.")
    text: str = setting(
        "", "The text that the model is run on, where the order or the router needs that.", metavar="TEXT",
        otherwise="some prose",
    )  # fmt: skip
    text_tokens: int = setting(1024, "How much of it.", metavar="N", low=1, high=LARGEST)
    dense_layers: tuple[int, ...] = setting((), "Layers that keep their mlp, e.g. 0,-1.", metavar="L,L")
    normalise: bool = setting(
        True, "Divide the chosen experts' weights by their sum; or take softmax, then top-k (exact only with --router "
        "zeros).", otherwise="normalise",
    )  # fmt: skip
    reinit: float = setting(0.5, "drop: share of every expert that is drawn anew.", metavar="SHARE", low=0, high=1)
    reinit_indices: str = setting(
        "shared", "drop: shared (the same neurons in gate, up and down) or independent (as the published script does).",
        metavar="WHICH", choices=("shared", "independent"),
    )  # fmt: skip
    noise: float = setting(
        0.0, "Noise on the experts, in standard deviations of the weights themselves (lossy).", metavar="STD", low=0,
        high=1e3, otherwise="0",
    )  # fmt: skip
    sources: tuple[str, ...] = setting(
        (), "mix: a further dense model of the same shape. Repeatable.", metavar="PATH", flag="source", many=True
    )
    attention: str = setting(
        "average", "mix: average all that is no expert, or take the first model's.", metavar="HOW",
        choices=("average", "first"),
    )  # fmt: skip
    attention_experts: int = setting(
        0, "Make the attention a mixture too: N groups of heads, written as a Hugging Face model with code of its own. "
        "With or without --experts.", metavar="N", low=0, high=LARGEST, otherwise="none",
    )  # fmt: skip
    attention_top_k: int = setting(
        0, "How many of the groups a token uses.", metavar="K", low=0, high=LARGEST, otherwise="all, which is exact"
    )
    seed: int = setting(0, "Of everything random; the same bits at any --max-memory.", low=0)
    force_lossy: bool = setting(False, "Allow what does not preserve the function.")

    def __post_init__(self) -> None:
        share: object = self.shared
        if type(share) in (int, float):
            object.__setattr__(self, "shared", repr(share))
        super().__post_init__()
        self._check_what_goes_together()
        _one_of(self.router_kind[0], ROUTERS, "--router")
        if self.scale_number is None:
            _one_of(self.scale, SCALES, "--scale")
        _ = self.shared_width

    def _check_what_goes_together(self) -> None:
        if self.attention_top_k and not self.attention_experts:
            raise UsageError("--attention-top-k goes with --attention-experts")
        needed = [flag(f) for f in fields(Settings) if f.name in NEEDED and not getattr(self, f.name)]
        own = [
            flag(f) for f in fields(Settings) if f.name not in (*NEEDED, *COMMON) and getattr(self, f.name) != f.default
        ]
        if needed and (len(needed) == 1 or own or not self.attention_experts):
            raise UsageError(
                f"{', '.join(needed)} {'is' if len(needed) == 1 else 'are'} missing",
                hint="for example --experts 8 --top-k 2",
            )
        if self.attention_experts and self.sources:
            raise UsageError("--attention-experts and --source do not go together", hint="mix first, then convert that")
        if self.attention_experts and self.attention != "average":
            raise UsageError("--attention belongs to --strategy mix, which does not go with --attention-experts")

    @property
    def router_kind(self) -> tuple[str, str]:
        """ "normal:0.02" -> ("normal", "0.02")."""
        name, _, rest = self.router.partition(":")
        return name, rest

    @property
    def shared_width(self) -> tuple[str, float]:
        """ "50%" -> ("share", 0.5); also "experts", "neurons" or "dense" and how many.  Raises UsageError."""
        if self.shared == "dense":
            return "dense", 1.0
        if match := re.fullmatch(r"(\d{1,9})[- ]?(expert|neuron)s?", self.shared):
            return match[2] + "s", int(match[1])
        percent = self.shared.endswith("%")
        text = self.shared.removesuffix("%")
        if _number(text, 0, 100 if percent else 1):
            return "share", float(text) / (100 if percent else 1)
        what = ": of what?" if text.isdigit() else " is no width of an expert"
        n = text if text.isdigit() else "1"
        raise UsageError(
            f"--shared {show(self.shared)}{what}",
            hint=f"{n}-experts (as wide as {n} of the others), {n}-neurons, a share such as 0.5, or dense",
        )

    @property
    def scale_number(self) -> float | None:
        return float(self.scale) if _number(self.scale, 0, 1e6) else None

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(Settings) if about(f)}


def _number(text: str, low: float, high: float) -> bool:
    try:
        return low <= float(text) < high
    except ValueError:
        return False


def _one_of(value: str, choices: Sequence[str], name: str) -> None:
    if value not in choices:
        raise UsageError(f"{name} {show(value)} is unknown", hint=suggest(value, choices, "choose from"))
