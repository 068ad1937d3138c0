"""`surgery experts` from folder to folder: open, choose, plan, stream, read back, prove.

done = experts("Mixtral-8x7B", "Mixtral-4x7B", keep="0-3", top_k=2)
done.report.bytes, done.proof.verdict
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgery import conversion
from surgery.containers.text import read_yaml
from surgery.formats import Checkpoint
from surgery.staging import check_free
from surgery.upcycling.derived import Outcome, Target, opened, plan_derived, write_derived
from surgery.upcycling.experts import Chosen, chosen
from surgery.upcycling.selection import HOWS, Selection, from_flags, from_recipe


def selection(flags: dict[str, Any], recipe: str | None = None) -> Selection:
    """What is asked for; flags win over a recipe.  Raises UsageError or ConfigError."""
    if recipe is None:
        return from_flags(flags)
    base = from_recipe(read_yaml(recipe, "recipe"), recipe)
    names = (*HOWS, "duplicate", "top_k", "by", "force_lossy")
    given = {name: flags[name] for name in names if flags.get(name) not in (None, (), False)}
    if not given:
        return base
    over = from_flags({"top_k": base.top_k or 1, **given})
    values = {name: getattr(over, name) for name in ("duplicate", "top_k", "by", "force_lossy") if name in given}
    return replace(base, default=over.default or base.default, layers={**base.layers, **over.layers}, **values)


def prepare(
    src: str | os.PathLike[str], wanted: Selection, target: Target
) -> tuple[Checkpoint, Chosen, conversion.Plan]:
    """Open and plan; nothing is written, and only routers (of `--by weight-norm` all experts) are read."""
    source = opened(src, target)
    made = chosen(source, wanted)
    return source, made, plan_derived(made.checkpoint, "experts", made.to_json(), target)


def experts(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    recipe: str | None = None,
    target: Target | None = None,
    force: bool = False,
    verify: bool = True,
    **flags: Any,
) -> Outcome:
    """Change the experts of a checkpoint; `flags` are those of `surgery experts`, `keep="0-3"` or `keep=("0-3", ...)`.

    Raises SurgeryError; `dst` appears whole, read back and proven, or not at all.
    """
    more = {k: flags.pop(k) for k in ("verify_tokens", "command", "progress") if k in flags}
    given = {k: (v,) if k in HOWS and isinstance(v, (str, int)) else v for k, v in flags.items()}
    wanted = selection(given, recipe)
    check_free(Path(dst), force)
    source, made, plan = prepare(src, wanted, target or Target())
    return write_derived(source, plan, dst, record={"experts": made.to_json()}, claim=made.claim(), force=force,
                         verify=verify, **more)  # fmt: skip
