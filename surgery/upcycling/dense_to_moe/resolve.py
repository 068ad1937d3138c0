"""What the settings mean for a model: widths, factors, and whether the function is preserved.

    layout = resolve(Settings(experts=64, top_k=8), spec)
    layout.strategy, layout.granularity, layout.m       # "virtual-group", 8, 192
    layout.losses                                       # () : exact

With N experts, k of them chosen, cut from copies of the mlp into G shards each, the chosen weights sum to one and every
shard of a group gets the same share, so the sum is 1/G of the dense mlp's output: G makes up for it (without the
normalisation, at a uniform router, N G / k).  silu is not homogeneous, so the factor may stand on `up` and `down` and
on the router's weights, but not on `gate`.  Sources: Komatsuzaki et al. 2212.05055 (copy), He et al. 2410.07524
(virtual groups), Zhu et al. 2406.16554 (partition).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from surgery.errors import ConfigError, UsageError
from surgery.model.spec import Spec
from surgery.upcycling.dense_to_moe.settings import Settings

OF_ONE = {"reinit": "drop", "reinit_indices": "drop", "attention": "mix"}  # settings that one strategy has


@dataclass(frozen=True)
class Layout:
    """The result's measures.

    m            width of an expert            s   of the shared one (0: none)     rest   neurons that are routed
    copies       of the mlp among the experts  up, down, gate   factors on the experts' matrices
    weight       factor on the router's weights (None: none)
    dense        layers that keep their mlp
    losses       why the function is not preserved; () if it is
    rounds       the factor is no power of two, so 16-bit weights are rounded
    notes        what is worth knowing
    """

    strategy: str
    experts: int
    top_k: int
    granularity: int
    copies: int
    m: int
    s: int
    rest: int
    dense: tuple[int, ...]
    gate: float
    up: float
    down: float
    weight: float | None
    whole_shared: bool = False
    losses: tuple[str, ...] = ()
    rounds: bool = False
    notes: tuple[str, ...] = ()

    @property
    def grouped(self) -> bool:
        """Whether runs of `granularity` experts share a row of the router."""
        return self.strategy == "virtual-group" and self.granularity > 1


def resolve(wanted: Settings, spec: Spec) -> Layout:
    """Raises UsageError if the numbers do not fit each other, ConfigError if the model cannot be upcycled."""
    _check_source(spec)
    n, k = wanted.experts, wanted.top_k
    if k > n:
        raise UsageError(f"--top-k {k} of --experts {n}: no more experts can be chosen than there are")
    shared, whole = _shared(wanted, spec.ffn)
    rest = spec.ffn if whole else spec.ffn - shared
    strategy, g = _strategy(wanted, rest)
    for name, of in OF_ONE.items():
        if strategy != of and getattr(wanted, name) != getattr(Settings, name):
            raise UsageError(f"--{name.replace('_', '-')} belongs to --strategy {of}, not to {strategy}")
    if wanted.sharing and (wanted.order != "gradient" or strategy != "partition"):
        raise UsageError("--sharing belongs to --strategy partition --order gradient")
    pieces = {"virtual-group": g, "partition": n}.get(strategy, 1)
    if rest % pieces:
        raise UsageError(
            f"{rest} neurons of the mlp cannot be cut into {pieces} equal experts",
            hint=f"it can be cut into {_divisors(rest)}",
        )
    if strategy == "virtual-group" and n % g:
        raise UsageError(f"--experts {n} are no whole copies of {g} shards", hint=f"choose a multiple of {g}")
    exact, default = _factors(wanted, strategy, g)
    gate, up, down, weight = _placed(wanted, default)
    losses = _losses(wanted, strategy, g, exact, gate, up * down * (weight or 1.0))
    m = rest // pieces
    notes = [f"experts are {m} wide, no multiple of 8: grouped matrix products want rows of 16 bytes"] if m % 8 else []
    if k == 1 and wanted.normalise:
        notes.append("with --top-k 1 the normalised weight is always 1, so that the router gets no gradient")
    if whole:
        down = 0.0
    return Layout(
        strategy, n, k, g, n // g if strategy == "virtual-group" else 1 if strategy == "partition" else n, m, shared,
        rest, _dense(wanted, spec.layers), gate, up, down, weight, whole, () if whole else tuple(losses),
        not whole and any(math.frexp(x)[0] != 0.5 for x in (gate, up, down)), tuple(notes),
    )  # fmt: skip


def _check_source(spec: Spec) -> None:
    if spec.experts:
        raise ConfigError(
            f"the model has {spec.experts} experts already", hint="surgery experts duplicates and prunes them"
        )
    if not spec.glu:
        raise ConfigError(
            f"a {spec.family} has a plain mlp without a gate, and no Hugging Face family has experts like that",
            hint="gated models (Llama, Mistral, Qwen, OLMo 2 ...) can be upcycled",
        )
    if spec.mlp_bias:
        raise ConfigError("the mlp has biases, for which experts have no place")


def _strategy(wanted: Settings, rest: int) -> tuple[str, int]:
    """The strategy's name and the granularity."""
    n, k, g = wanted.experts, wanted.top_k, wanted.granularity
    name = wanted.strategy
    if name == "auto":
        g = k if g is None else g
        fits = g > 1 and rest % g == 0 and n % g == 0 and k % g == 0
        if not fits and wanted.granularity is not None and g > 1:
            raise UsageError(
                f"--granularity {g} does not divide {rest} neurons, {n} experts and top-{k} alike",
                hint=f"it has to divide {math.gcd(rest, n, k)}",
            )
        name = "virtual-group" if fits else "copy"
    if name == "virtual-group":
        return name, g or k
    if wanted.granularity not in (None, 1):
        raise UsageError(f"--granularity belongs to --strategy virtual-group, not to {name}")
    return name, 1


def _factors(wanted: Settings, strategy: str, g: int) -> tuple[float, float]:
    """The factor with which the function would be preserved, and the one that is taken by default."""
    n, k = wanted.experts, wanted.top_k
    if strategy == "partition":
        return float(n), float(n) / k if k < n else float(n)
    exact = float(g) if wanted.normalise else n * g / k
    return exact, exact


def _placed(wanted: Settings, total: float) -> tuple[float, float, float, float | None]:
    """Factors on gate, up, down and the router's weights."""
    if wanted.scale_number is not None:
        return 1.0, 1.0, wanted.scale_number, None
    if wanted.scale == "up-down":
        up = 2.0 ** round(math.log2(total) / 2)
        return 1.0, up, total / up, None
    third = total ** (1 / 3)
    return {
        "auto": (1.0, 1.0, total, None),
        "down": (1.0, 1.0, total, None),
        "router": (1.0, 1.0, 1.0, total),
        "cbrt": (third, third, third, None),
        "none": (1.0, 1.0, 1.0, None),
    }[wanted.scale]


def _losses(wanted: Settings, strategy: str, g: int, exact: float, gate: float, total: float) -> list[str]:
    """Every reason why the result computes another function."""
    n, k, out = wanted.experts, wanted.top_k, []
    uniform = wanted.router_kind[0] == "zeros"
    if strategy == "partition":
        if k < n:
            out.append(f"partition: a token uses {k} of the {n} pieces of the mlp")
        elif not uniform:
            out.append("partition: the pieces are weighted unequally; only --router zeros weighs them all the same")
    elif not wanted.normalise and not uniform:
        out.append("the chosen weights do not sum to a constant (--no-normalise), unless --router zeros")
    if strategy == "virtual-group" and k % g:
        out.append(f"virtual-group: top-{k} takes no whole groups of {g} shards")
    if strategy == "virtual-group" and uniform and g > 1 and k < n:
        out.append("virtual-group: with --router zeros all experts tie, and no whole groups are chosen")
    if gate != 1.0:
        out.append("scale: silu is not homogeneous, so a factor on gate is no factor on the output")
    elif not math.isclose(total, exact):
        out.append(f"scale: the factor is {total:g}, and {exact:g} would preserve the function")
    if strategy == "drop" and wanted.reinit:
        out.append(f"drop: {wanted.reinit:.0%} of every expert's neurons are drawn anew")
    if strategy == "mix":
        out.append("mix: the experts come from different models")
    if wanted.sharing and strategy in ("partition", "virtual-group"):
        out.append("sharing: experts take the same neurons, and others are lost")
    if wanted.noise:
        out.append(f"noise: {wanted.noise:g} of the weights' standard deviation is added to the experts")
    return out


def _shared(wanted: Settings, f: int) -> tuple[int, bool]:
    """Neurons of the shared expert, and whether it is a whole copy of the mlp."""
    kind, number = wanted.shared_width
    if kind == "dense":
        return f, True
    count = round(number * f) if kind == "share" else int(number)
    if kind == "experts":
        count = _as_wide_as(wanted, f, count)
    if count >= f:
        raise UsageError(
            f"--shared {wanted.shared}: {count} of {f} neurons leave none for the experts",
            hint="--shared dense keeps the whole mlp beside experts that add nothing at first",
        )
    return count, False


def _as_wide_as(wanted: Settings, f: int, number: int) -> int:
    """Neurons of a shared expert that is as wide as a number of the others.  Raises UsageError."""
    for pieces in dict.fromkeys((wanted.granularity or wanted.top_k, wanted.experts, 1)):
        count, left = divmod(number * f, pieces + number)
        if not left:
            strategy, g = _strategy(wanted, f - count)
            if {"virtual-group": g, "partition": wanted.experts}.get(strategy, 1) == pieces:
                return count
    raise UsageError(f"--shared {wanted.shared}: {f} neurons of the mlp cannot be divided like that",
                     hint=f"{f} has the divisors {_divisors(f)}; or say how many: --shared N-neurons")  # fmt: skip


def _dense(wanted: Settings, layers: int) -> tuple[int, ...]:
    out = set()
    for i in wanted.dense_layers:
        if not -layers <= i < layers:
            raise UsageError(f"--dense-layers {i}: the model has the layers 0 to {layers - 1}")
        out.add(i % layers)
    if len(out) == layers:
        raise UsageError("--dense-layers leaves no layer for experts")
    return tuple(sorted(out))


def _divisors(n: int) -> str:
    found = [str(d) for d in range(2, min(n, 257)) if n % d == 0]
    return ", ".join(found[:12]) or "no equal parts"
