"""Adam's state in OLMo-core: `optim.state.NAME.exp_avg` and so on beside the weights, which are its fp32 masters.

SkipStepAdamW before 2025-07-03 never counted its steps: 0 beside moments that are not, and a run that computed with the
bias corrections of step 1 throughout.  What that means elsewhere is for people to say (-O optimizer_step=N).
Source: OLMo-core `distributed/checkpoint/__init__.py`, `optim/skip_step_optimizer.py` (pull request 317).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.containers.dcp import Dcp
from surgery.errors import LayoutError
from surgery.formats.dcp_states import flattened, named_tensors, read_named
from surgery.formats.olmo.files import unwrapped
from surgery.formats.optimizer import M, States, V, Written
from surgery.formats.topology import Rank
from surgery.formats.weave import Stored
from surgery.tensors.lazy import ITEMSIZE, Lazy, boxes

TOP = "optim"
_BLOCK = 1 << 20
UNCOUNTED = (
    "its optimizer says step 0 beside moments that are not zero: SkipStepAdamW before 2025-07-03 never counted them, "
    "and its updates were about 2.24 times the rate at betas of 0.9 and 0.95"
)


def read_states(dcp: Dcp, folder: Path, said: int | None) -> States | None:
    """`said` is the number of steps that somebody has given.  Raises LayoutError for a run that never counted them."""
    found = read_named(dcp, TOP)
    if found is None:
        return None
    notes: tuple[str, ...] = ()
    if said is not None:
        notes = (f"the optimizer's step is {said:,}, as was said, not {found.step:,}",) if said != found.step else ()
    elif found.step == 0 and any(_moved(t) for t in found.roles[V].values()):
        raise LayoutError(UNCOUNTED, file=folder, hint="-O optimizer_step=N says how often it was updated, for a run "
                          "with corrected bias and a rate of your choice")  # fmt: skip
    roles = {role: {Rank(): unwrapped(tensors, folder)} for role, tensors in found.roles.items()}
    return States(roles, found.step if said is None else said, found.groups, notes)


def _moved(tensor: Lazy) -> bool:
    """Whether anything but zeros is there."""
    return any(bool(tensor.read(box).any()) for box in boxes(tensor.shape, ITEMSIZE[tensor.dtype], _BLOCK))


def stored_states(written: Written, names: Mapping[str, Stored]) -> tuple[dict[str, Stored], dict[str, Any]]:
    """The tensors and records beside the weights of these names; a second copy of a tied tensor has none."""
    mine = [name for name, stored in names.items() if not stored.copy]
    tensors = named_tensors(TOP, {role: written.roles[role][Rank()] for role in (M, V)}, written.step, mine)
    return tensors, flattened(TOP, mine, written.group, {"step_increment_bugfix": True})
