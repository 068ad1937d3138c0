"""`surgery upcycle --collapse`: from a mixture of experts back to a dense model.

done = collapse("SmolLM2-moe", "SmolLM2-again")
done.proof.verdict         # "exact"
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from surgery.errors import UsageError
from surgery.staging import check_free
from surgery.upcycling.collapse import collapsed
from surgery.upcycling.derived import Outcome, Target, opened, plan_derived, write_derived


def collapse(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    by: str = "exact",
    force_lossy: bool = False,
    target: Target | None = None,
    force: bool = False,
    **more: Any,
) -> Outcome:
    """Turn a mixture of experts into a dense model; see `collapse.py` for what is exact.

    `by` is exact, average or router; `more` are verify, verify_tokens, command and progress of `write_derived`.
    Raises SurgeryError; `dst` appears whole, read back and proven, or not at all.
    """
    check_free(Path(dst), force)
    to = target or Target()
    source = opened(src, to)
    made = collapsed(source, by, force_lossy)
    plan = plan_derived(made.checkpoint, "collapse", made.to_json(), to)
    return write_derived(
        source, plan, dst, record={"collapse": made.to_json()}, claim=made.claim(), force=force, **more
    )


def run(src: str, dst: str, flags: dict[str, Any], names: tuple[str, ...]) -> None:
    """The command; `names` are flags that mean nothing here.  Raises UsageError if one is given."""
    import click

    from surgery.upcycling import derived_render
    from surgery.upcycling.experts_command import target_of

    if odd := [name for name in names if flags.get(name) not in (None, (), False)]:
        raise UsageError(f"--{odd[0].replace('_', '-')} and --collapse do not go together")
    by, lossy = flags["collapse_by"] or "exact", bool(flags["force_lossy"])
    target = target_of(flags)
    if flags["dry_run"]:
        source = opened(src, target)
        made = collapsed(source, by, lossy)
        plan = plan_derived(made.checkpoint, "collapse", made.to_json(), target)
        data = derived_render.data_of(plan, "collapse", made.to_json())
        click.echo(json.dumps(data, indent=2)) if flags["as_json"] else derived_render.plan(data, "collapse")
        return
    done = collapse(src, dst, by=by, force_lossy=lossy, target=target, force=flags["force"],
                    verify=not flags["no_verify"], verify_tokens=flags["verify_tokens"],
                    command=["surgery", *sys.argv[1:]])  # fmt: skip
    if flags["as_json"]:
        click.echo(json.dumps(done.to_json(), indent=2))
    else:
        derived_render.outcome(done, "collapse")
