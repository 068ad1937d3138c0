"""Adam's state beside Hugging Face's weights: as transformers' Trainer numbers it, or by name, as FSDP saves it.

    states = read_states(Path("checkpoint-500"), spec, parts)
    trainer_files(written, "llama")                # optimizer.pt, scheduler.pt, trainer_state.json
    sharded_files(written, "llama")                # optimizer_0/ in place of optimizer.pt

optimizer.pt     torch's state dict: numbers, no names; through both groups (decayed, spared), those of a group in the
                 order in which the class registers its parameters (order.py).  Nothing but the shapes can prove it.
optimizer.bin    the same by names (FSDP, whole)      optimizer_0/     torch's DCP by names (FSDP, in shards)
The names are those in memory, where experts are stacked.  The weights are the masters.
Source: transformers trainer.py (_save_optimizer_and_scheduler, create_optimizer), accelerate utils/fsdp_utils.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgery.containers.dcp import Dcp
from surgery.containers.dcp_writer import dcp_files
from surgery.containers.output import OutputFile, text_file
from surgery.containers.torch_writer import torch_file
from surgery.errors import FileError, NoStateError, show, some
from surgery.formats.dcp_states import Named, grouped, named_tensors, paths, read_named
from surgery.formats.hf.order import in_order, spared, spared_before
from surgery.formats.hf.table import table
from surgery.formats.optimizer import (
    ALONE,
    MOMENTS,
    Group,
    M,
    Optimizer,
    States,
    Written,
    decay_changes,
    group_of,
    one_step,
)
from surgery.formats.table import Table
from surgery.formats.topology import ONE_RANK, Rank
from surgery.formats.torch_states import STEP, listed, moments_of, read_tree, step_of, torch_group
from surgery.formats.weave import Parts, spread
from surgery.model.spec import Spec
from surgery.tensors.lazy import Fill, Lazy

NUMBERED, WHOLE, SCHEDULER, STATE = "optimizer.pt", "optimizer.bin", "scheduler.pt", "trainer_state.json"
SHARDED, TOP = "optimizer_0", "optimizer"  # accelerate's names of FSDP's DCP folder, and of the state in it
_MEMORY = (".experts.gate_up_proj", "mlp.gate.moe_statics.", "lm_head.weight", "transformer.")  # as names show it
_BUFFER = re.compile(r"e_score_correction_bias$")
_BATCH = 8  # rows: the default of TrainingArguments; a Trainer warns where its own is another
_CONTROL = ("epoch_stop", "evaluate", "log", "save", "training_stop")
_TOP = re.compile(r"(?:(.*)\.)?state\..+\.exp_avg")


def in_memory(family: str) -> Table:
    """The table of a family's parameters as transformers 5 has them in memory."""
    return table(family, _MEMORY)


def read_states(folder: Path, spec: Spec, parts: Parts) -> States | None:
    """None if there is none.  Raises SurgeryError for several, and for one that does not fit the model."""
    files = [folder / name for name in (NUMBERED, WHOLE) if (folder / name).is_file()]
    files += [path.parent for path in sorted(folder.glob("*/.metadata"))]
    if len(files) > 1:
        raise FileError(f"holds several states of an optimizer: {some(p.name for p in files)}", file=folder,
                        hint="move away those that are not wanted")  # fmt: skip
    if not files:
        return None
    memory = in_memory(spec.family)
    woven = spread(memory, parts, spec, ONE_RANK)[Rank()]
    weights = {name: stored.tensor for name, stored in woven.items() if not _BUFFER.search(name)}
    notes: tuple[str, ...] = ()
    if files[0].is_dir():
        found = _sharded(files[0])
    else:
        found, numbered = _whole(files[0], spec.family, weights)
        notes = (f"{files[0].name} numbers its states: they are taken in the order in which transformers registers a "
                 f"{spec.family}'s parameters, which their shapes alone confirm",) * numbered  # fmt: skip
    if found is None:
        return None
    roles = {role: {Rank(): tensors} for role, tensors in found.roles.items()}
    paths = tuple(p for p in files if p.is_file())
    return States(roles, found.step, found.groups, notes, paths, memory, {Rank(): weights})


def _sharded(folder: Path) -> Named | None:
    """A DCP folder, under whatever name the state dict has in it."""
    dcp = Dcp(folder)
    tops = {m[1] or "" for name in dcp.tensors if (m := _TOP.fullmatch(name))}
    if len(tops) > 1:
        raise FileError(f"holds several states of an optimizer: {some(sorted(tops))}", file=folder)
    return read_named(dcp, tops.pop()) if tops else None


def _whole(path: Path, family: str, weights: Mapping[str, Lazy]) -> tuple[Named, bool]:
    """The state by name, and whether it was by number."""
    states, groups = read_tree(path)
    keys = [group.get("params") for group in groups]
    numbered = not any(type(key) is str for own in keys if isinstance(own, list) for key in own)
    owners = (_divided(keys, in_order(family, weights), path) if numbered
              else [listed(group, path) for group in groups])  # fmt: skip
    roles: dict[str, dict[str, Lazy]] = {role: {} for role in MOMENTS}
    steps, settings, at = [], dict[str, Group](), 0
    for group, owned in zip(groups, owners, strict=True):
        for name in owned:
            fields = states.get(at if numbered else name)
            if not fields:
                raise NoStateError(f"has no state of {show(name)}", file=path, hint="a parameter that was frozen, or "
                                   f"saw no gradient, has none: {ALONE}")  # fmt: skip
            steps.append(step_of(fields, group, path))
            for role, tensor in moments_of(fields, name, path).items():
                roles[role][name] = tensor
            at += 1
        settings |= dict.fromkeys(owned, group_of(group, path)) if owned else {}
    if len(states) != at:
        raise FileError(f"holds {len(states):,} states for {at:,} parameters", file=path)
    return Named(roles, one_step(steps, path), settings), numbered


def _divided(keys: Sequence[object], names: Sequence[str], path: Path) -> list[list[str]]:
    """The parameters of each group.  Raises NoStateError unless the numbers fit one of the Trainer's ways to group."""
    counts = [len(own) if isinstance(own, list) else -1 for own in keys]
    if [key for own in keys if isinstance(own, list) for key in own] != list(range(sum(counts))):
        raise FileError("does not number its parameters from 0 through all groups", file=path)
    for rule in (spared, spared_before):
        both = [[n for n in names if not rule(n)], [n for n in names if rule(n)]]
        if counts == [len(owned) for owned in both]:
            return both
    if counts == [len(names)]:
        return [list(names)]
    wanted = [len([n for n in names if spared(n) == kind]) for kind in (False, True)]
    raise NoStateError(
        f"groups {some(counts)} parameters, of which the model has {some(wanted)}", file=path,
        hint=f"transformers 4 numbered experts one by one, and frozen parameters or adapters have no state: {ALONE}",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- writing


def trainer_files(written: Written, family: str) -> list[OutputFile]:
    """What transformers' Trainer resumes from.  Raises LayoutError if its two groups cannot say the settings."""
    both = _both(written, family, spared)
    numbers = {name: i for i, name in enumerate(name for group in both for name in group["params"])}
    moments = {role: written.roles[role][Rank()] for role in MOMENTS}
    state = {
        i: {STEP: Fill((), "float32", written.step), **{role: moments[role][name].tensor for role in MOMENTS}}
        for name, i in numbers.items()
    }
    groups = [{**group, "fused": True, "params": [numbers[n] for n in group["params"]]} for group in both]
    return [torch_file(NUMBERED, {"state": state, "param_groups": groups}), *_beside(written, both[0]["lr"])]


def sharded_files(written: Written, family: str) -> list[OutputFile]:
    """The state by name in a DCP folder, as FSDP's is saved.  Raises LayoutError as `trainer_files`."""
    spares = {not written.group(name).weight_decay for name in written.roles[M][Rank()]} == {True, False}
    groups = _both(written, family, (lambda name: not written.group(name).weight_decay) if spares else spared)
    names = [name for group in groups for name in group["params"]]
    tensors = named_tensors(TOP, {role: written.roles[role][Rank()] for role in MOMENTS}, written.step, names)
    files = dcp_files(
        f"{SHARDED}/", {name: stored.tensor for name, stored in tensors.items()}, grouped(TOP, groups),
        planner=paths(TOP, names, groups), copies=frozenset(n for n, stored in tensors.items() if stored.copy),
    )  # fmt: skip
    return [*files, *_beside(written, groups[0]["lr"])]


WRITERS: Mapping[str, Callable[[Written, str], list[OutputFile]]] = {"trainer": trainer_files, "fsdp": sharded_files}


def _both(written: Written, family: str, rule: Callable[[str], bool]) -> list[dict[str, Any]]:
    """Two groups (decayed, spared by the rule), as a Trainer has them, their `params` by name."""
    names = in_order(family, [name for name in written.roles[M][Rank()] if not _BUFFER.search(name)])
    settings = written.shared(names, "a Trainer's optimizer")
    both = [[n for n in names if rule(n) == kind] for kind in (False, True)]
    return [{**torch_group(replace(settings, weight_decay=_decay(written, owned))), "params": owned} for owned in both]


def _beside(written: Written, lr: float) -> list[OutputFile]:
    """The scheduler and the counters of a Trainer."""
    scheduler = {"last_epoch": written.step, "_step_count": written.step + 1, "_last_lr": [lr, lr],
                 "lr_lambdas": [None, None]}  # fmt: skip
    said = {
        "global_step": written.step, "epoch": 0.0, "train_batch_size": _BATCH,
        "log_history": [{"step": written.step, "learning_rate": lr}],
        "stateful_callbacks": {"TrainerControl": {"args": {f"should_{x}": False for x in _CONTROL}, "attributes": {}}},
    }  # fmt: skip
    return [torch_file(SCHEDULER, scheduler), text_file(STATE, (json.dumps(said, indent=2) + "\n").encode())]


def _decay(written: Written, owned: Sequence[str]) -> float:
    return max((written.group(name).weight_decay for name in owned), default=0.0)


def notes_of(found: Optimizer, family: str, form: str) -> tuple[str, ...]:
    """What somebody who resumes from what a writer of this name wrote has to know."""
    rows = [r for r in in_memory(family).rows if r.parts[0] in found.groups and not r.copy]
    changed = sorted({name for name, _ in decay_changes(found, rows, spared)})
    if form == "fsdp":
        named = (
            f"{SHARDED}/ holds the state by name, after {found.step:,} updates: torch.distributed.checkpoint.load "
            f"fills {{{TOP!r}: get_optimizer_state_dict(model, optimizer)}} from it, for set_optimizer_state_dict"
        )
        kept = (
            f"its groups are the source's, where {some(changed, 20)} did otherwise than in a Trainer, which decays all "
            "but norms and biases: divide the parameters in that way, or set weight_decay anew once the state is "
            "loaded, for torch gives groups that are divided in another way the decay of any of their parameters"
        )
        return (named, kept) if changed else (named,)
    told = f"a Trainer decays all but norms and biases: {some(changed, 20)} did otherwise before" if changed else ""
    note = (
        f"resume_from_checkpoint goes on at update {found.step:,} of your own schedule and data: give the rate and the "
        "length that belong to it, and ignore_data_skip=True for data that begin anew"
    )
    fused = "the Trainer of transformers 5 reads no experts when it resumes: load the model itself from this folder"
    return (*([told] if told else []), note, *([fused] if any(r.stacks_experts for r in rows) else []))
