"""What may be left out where a target cannot hold it, because the logits do not depend on it: `--allow NAME`.

    slimmer = without(checkpoint, ["qkv_bias"], error, plan)     # the same logits, no biases in the attention
    surgery convert qwen llama-like --to meta --allow qkv_bias   # only if all of them are zero

A name is a field of the Spec, or one of its own below.  Nothing is believed: biases are read and must be zero, windows
must reach as far as the context.  What is not in `RULES` is never left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from surgery.errors import ConfigError, SurgeryError, UsageError, some
from surgery.formats.base import Checkpoint
from surgery.model.fields import NAME
from surgery.model.spec import FIELDS, Spec, template_of

if TYPE_CHECKING:
    import torch

Refusal = str | None


@dataclass(frozen=True)
class Rule:
    """One thing that can be left out.

    `changes` gives the fields of the Spec without it ({}: this model has no such thing); parts that the model has no
    more must be zeros (biases) or ones (norms).  `refuses` says what else is in the way, None if nothing is.
    """

    meaning: str
    changes: Callable[[Spec], Mapping[str, Any]]
    refuses: Callable[[Spec], Refusal] = lambda spec: None


def _flag(field: str) -> Callable[[Spec], Mapping[str, Any]]:
    return lambda spec: {field: False} if getattr(spec, field) else {}


def _short_windows(spec: Spec) -> Refusal:
    widest, shortest = spec.context, min(w for w in spec.windows if w)
    if widest is None or shortest < widest:
        return f"a window of {shortest} is shorter than the context of {widest or 'unknown length'}"
    other = spec.rope_local is not None and spec.rope_local != spec.rope
    return "layers with a window have rotary embeddings of their own" if other else None


RULES: Mapping[str, Rule] = {
    "qkv_bias": Rule("biases of queries, keys and values, if all are zero", _flag("qkv_bias")),
    "o_bias": Rule("biases of the attention's output, if all are zero", _flag("o_bias")),
    "mlp_bias": Rule("biases of the mlp, if all are zero", _flag("mlp_bias")),
    "router_bias": Rule("biases of the router, if all are zero", _flag("router_bias")),
    "norm_bias": Rule(
        "biases of norms, if all are zero", lambda spec: {"norm": "layer_no_bias"} if spec.norm == "layer" else {}
    ),
    "norm_weight": Rule(
        "weights of LayerNorms, if all are one (and biases zero)",
        lambda spec: {"norm": "none"} if spec.norm in ("layer", "layer_no_bias") else {},
    ),
    "windows": Rule(
        "sliding windows, if none is shorter than the longest context",
        lambda spec: {"windows": (), "rope_local": None} if any(spec.windows) else {},
        _short_windows,
    ),
}
NAMES = ", ".join(RULES)


def without(
    checkpoint: Checkpoint, allow: Collection[str], error: ConfigError, plan: Callable[[Checkpoint], object]
) -> Checkpoint:
    """The checkpoint without what `allow` names, after `plan` has failed with `error`.

    Raises ConfigError if something that is named has an effect, or is not all that is in the way; its hint says what
    could be allowed.
    """
    check_names(allow, checkpoint)
    out = checkpoint
    for name in dict.fromkeys(allow):
        if name in RULES and RULES[name].changes(out.spec):
            out = _drop(out, name)
    try:
        plan(out)
    except ConfigError as still:
        hint = _suggestion(checkpoint, plan)
        raise ConfigError(still.what, file=still.file, hint=hint or error.hint) from None
    return out


def check_names(allow: Collection[str], checkpoint: Checkpoint) -> None:
    """Raise an error for a name that nothing has, or that cannot be left out without an effect."""
    for name in allow:
        if name in RULES or name in checkpoint.facts:
            continue
        if name in FIELDS and FIELDS[name].kind == NAME:  # what no computation uses is left out without being asked
            continue
        if name in FIELDS:
            raise ConfigError(f"--allow {name}: the logits depend on it, it is never left out",
                              hint=f"what can be: {NAMES}")  # fmt: skip
        raise UsageError(f"--allow {name}: there is no such thing", hint=f"what can be left out: {NAMES}")


def _drop(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """Without one thing.  Raises ConfigError if the logits depend on it."""
    rule, spec = RULES[name], checkpoint.spec
    if reason := rule.refuses(spec):
        raise ConfigError(f"--allow {name}: the logits depend on it: {reason}")
    slim = spec.replace(**rule.changes(spec))
    gone = set(spec.part_names()) - set(slim.part_names())
    telling = [part for part in sorted(gone) if not _neutral(part, checkpoint.parts[part].full())]
    if telling:
        raise ConfigError(f"--allow {name}: the logits depend on it: {some(telling)} {_must(telling[0])}")
    parts = {n: checkpoint.parts[n] for n in slim.part_names()}
    ignored = {template_of(n): f"{'ones' if _is_weight(n) else 'zeros'} only (--allow {name})" for n in gone}
    note = f"left out, as the logits do not depend on it (--allow {name}): {rule.meaning.partition(', if')[0]}"
    return replace(
        checkpoint,
        spec=slim,
        parts=parts,
        ignored={**checkpoint.ignored, **ignored},
        notes=(*checkpoint.notes, note),
    )


def _is_weight(part: str) -> bool:
    return not part.endswith(".bias")


def _neutral(part: str, data: torch.Tensor) -> bool:
    return bool((data == (1 if _is_weight(part) else 0)).all())


def _must(part: str) -> str:
    return "are not all one" if _is_weight(part) else "are not all zero"


def _suggestion(checkpoint: Checkpoint, plan: Callable[[Checkpoint], object]) -> str | None:
    """Which names would make it work, if any do."""

    def works(names: Collection[str]) -> bool:
        out = checkpoint
        try:
            for name in names:
                out = _drop(out, name)
            plan(out)
        except SurgeryError:
            return False
        return True

    names = [n for n, rule in RULES.items() if rule.changes(checkpoint.spec) and _has_no_effect(checkpoint, n)]
    if not names or not works(names):
        return None
    for name in list(names):
        rest = [n for n in names if n != name]
        names = rest if works(rest) else names
    return f"the logits do not depend on it: {' '.join(f'--allow {n}' for n in names)}"


def _has_no_effect(checkpoint: Checkpoint, name: str) -> bool:
    try:
        _drop(checkpoint, name)
    except SurgeryError:
        return False
    return True
