"""Adam's state in OLMo's layouts: optim.pt of whole tensors by name, torch's DCP, and the flat pieces of FSDP.

    states = read_states(Path("step1000-unsharded"), "unsharded")
    tree, replicas = optim_tree(written, names, spell)

Weights are fp32, and so the masters.  Names in a group are sorted as texts (blocks.10 before blocks.2).  Of the layout
`local`, each rank's optim/rankN.pt holds one piece per tensor that it has something of, numbered by the list
`param_names`; where a piece lies in its tensor is what model/rankN.pt says.
Source: allenai/OLMo `olmo/optim.py` (get_param_groups), `olmo/checkpoint.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.containers.dcp import Dcp
from surgery.errors import FileError, LayoutError, show
from surgery.formats.dcp_states import Named, read_named
from surgery.formats.olmo.files import plain, ungrouped, unwrapped
from surgery.formats.olmo.sharded import Run, assemble, flat_pieces, rank_files
from surgery.formats.optimizer import MOMENTS, Group, M, States, V, Written, group_of, one_step
from surgery.formats.topology import Rank
from surgery.formats.torch_states import STEP, Fields, listed, moments_of, read_tree, step_of, torch_group
from surgery.formats.weave import Stored
from surgery.tensors.lazy import Fill, Lazy

FILE = "optim.pt"
TRAINER = "train.pt"  # without which OLMo's own loader takes no optimizer


def read_states(folder: Path, layout: str) -> States | None:
    """None if there is none, or none that is read: of the layouts unsharded, torch_new and local."""
    read = READERS.get(layout)
    if read is None:
        return None
    found, files = read(folder)
    if found is None:
        return None
    roles = {role: {Rank(): ungrouped(unwrapped(tensors, folder))} for role, tensors in found.roles.items()}
    groups = ungrouped({new: group for name, group in found.groups.items() for new in plain(name)})
    return States(roles, found.step, groups, files=files)


Found = tuple[Named | None, tuple[Path, ...]]


def _whole(folder: Path) -> Found:
    """optim.pt: states by name, or (of runs with DDP) by place in the joined lists of names."""
    path = folder / FILE
    if not path.is_file():
        return None, ()
    states, groups = read_tree(path)
    if not states:
        return None, ()
    names = _names(groups, path)
    roles: dict[str, dict[str, Lazy]] = {role: {} for role in MOMENTS}
    steps = []
    for key, fields in states.items():
        name = _name(key, names, path)
        for role, tensor in moments_of(fields, name, path).items():
            roles[role][name] = tensor
        steps.append(step_of(fields, {}, path))
    settings = {name: group_of(group, path) for group in groups for name in _listed(group, path)}
    return Named(roles, one_step(steps, path), settings), (path,)


def _sharded(folder: Path) -> Found:
    return read_named(Dcp(folder / "model_and_optim"), "optim"), ()


def _pieces(folder: Path) -> Found:
    """optim/rankN.pt beside model/rankN.pt, of as many ranks."""
    if not (folder / "optim").is_dir():
        return None, ()
    files, models = rank_files(folder / "optim", "rank", ".pt"), rank_files(folder / "model", "rank", ".pt")
    if len(files) != len(models):
        raise FileError(f"holds {len(files)} ranks, model/ {len(models)}", file=folder / "optim",
                        hint="copy the files of every rank")  # fmt: skip
    runs: dict[str, dict[str, list[Run]]] = {role: {} for role in MOMENTS}
    shapes: dict[str, tuple[int, ...]] = {}
    steps: list[float] = []
    groups: dict[str, Group] = {}
    trees = [read_tree(path) for path in files]
    if not any(states for states, _ in trees):
        return None, ()
    for path, model, (states, found) in zip(files, models, trees, strict=True):
        names = _names(found, path)
        groups |= {name: group_of(group, path) for group in found for name in _listed(group, path)}
        mine = {_name(key, names, path): fields for key, fields in states.items()}
        steps += [step_of(fields, {}, path) for name, fields in mine.items()]
        held = {plain(name)[0]: fields for name, fields in mine.items()}
        for stored, shape, start, stop in flat_pieces(model):
            name = plain(stored)[0]
            shapes[name] = shape
            for role in MOMENTS if start < stop else ():
                if name not in held:
                    raise FileError(f"has no state for its piece of {show(name)}", file=path)
                runs[role].setdefault(name, []).append((start, stop, moments_of(held[name], name, path)[role]))
    roles = {role: {n: assemble(n, shapes[n], pieces, str(folder / "optim")) for n, pieces in named.items()}
             for role, named in runs.items()}  # fmt: skip
    return Named(roles, one_step(steps, folder / "optim"), groups), tuple(files)


READERS: Mapping[str, Callable[[Path], Found]] = {
    "unsharded": _whole,
    "sharded: torch_new": _sharded,
    "sharded: local": _pieces,
}


def _names(groups: Sequence[Fields], path: Path) -> list[str]:
    return [name for group in groups for name in _listed(group, path)]


def _listed(group: Fields, path: Path) -> list[str]:
    """The weights of a group: their names, or those of the modules that wrap them."""
    return listed(group, path, ("param_names", "params"))


def _name(key: object, names: Sequence[str], path: Path) -> str:
    if type(key) is str:
        return key
    if type(key) is int and 0 <= key < len(names):
        return names[key]
    raise FileError(f"has a state for {show(key)}, which no group lists", file=path)


# ------------------------------------------------------------------------------------------------------- writing


def optim_tree(
    written: Written, names: Mapping[str, Stored], spell: Callable[[str], str]
) -> tuple[dict[str, Any], frozenset[str]]:
    """The tree of optim.pt, and the paths in it of replicas.  Groups: what decays, then what does not."""
    m, v = written.roles[M][Rank()], written.roles[V][Rank()]
    ordered = sorted(names, key=spell)
    # a count for each parameter: torch would add to one that they share once for every parameter
    state = {spell(n): {STEP: Fill((), "float32", written.step), M: m[n].tensor, V: v[n].tensor} for n in ordered}
    copies = frozenset(f"state.{spell(n)}.{role}" for n in ordered for role in MOMENTS if m[n].copy)
    groups = [_group(written, [n for n in ordered if bool(written.group(n).weight_decay) == decayed], spell)
              for decayed in (True, False)]  # fmt: skip
    return {"state": state, "param_groups": [g for g in groups if g]}, copies


def trainer_tree(step: int) -> dict[str, Any]:
    """What train.pt says: the update at which a run goes on, with data that begin anew."""
    lists: dict[str, Any] = {name: [] for name in ("checkpoints", "unsharded_checkpoints", "ephemeral_checkpoints")}
    return {"epoch": 0, "global_step": step, "global_train_examples_seen_this_epoch": 0, "global_train_tokens_seen": 0,
            **lists}  # fmt: skip


def _group(written: Written, names: Sequence[str], spell: Callable[[str], str]) -> dict[str, Any]:
    if not names:
        return {}
    settings: set[Group] = {written.group(name) for name in names}
    if len(settings) > 1:
        raise LayoutError("OLMo's optimizer has two groups, decayed or not: the source's settings differ "
                          "in more")  # fmt: skip
    spelled = [spell(name) for name in names]
    return {"params": list(spelled), "param_names": [f"_fsdp_wrapped_module.{n}" for n in spelled], "sharded": True,
            "max_grad_norm": None, "max_grad_norm_ratio": None, **torch_group(settings.pop())}  # fmt: skip
