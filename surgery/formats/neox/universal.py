"""Adam's state as DeepSpeed's universal checkpoints hold it: a folder of whole tensors for each parameter.

    states = read_universal(folder, shards[Rank()])
    yield from universal_files("global_step1000", written, ranks[Rank()], gated=True)

zero/NAME/fp32.pt, exp_avg.pt, exp_avg_sq.pt     {"param": whole tensor, "cat_dim": what tensor parallelism divides}
zero/NAME/step.pt                                the updates, as FusedAdam counts them: a number
zero/optimizer_state.pt                          settings of groups (what decays, then what does not)
latest_universal                                 the folder's name
How tensor-parallel ranks would divide query_key_value depends on the release: one rank reads and writes these.
Source: DeepSpeed checkpoint/ds_to_universal.py, checkpoint/universal_checkpoint.py, runtime/base_optimizer.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgery.containers import open_file
from surgery.containers.output import OutputFile, text_file
from surgery.containers.pickles.records import TensorRecord
from surgery.containers.torch_writer import torch_file
from surgery.errors import FileError, LayoutError, show
from surgery.formats.optimizer import ALONE, MASTER, MOMENTS, ROLES, Group, States, Written, group_of, one_step
from surgery.formats.topology import Rank
from surgery.formats.torch_states import STEP, number_of
from surgery.formats.weave import Stored
from surgery.tensors.lazy import Lazy

FOLDER, SETTINGS, LATEST = "zero", "optimizer_state.pt", "latest_universal"
DEEPSPEED = "0.16.0"  # which wrote this form; releases refuse states of ZeRO before 0.3.17
_FILES = {MASTER: "fp32", **{role: role for role in MOMENTS}}
_COLUMNS = re.compile(r"\.(attention\.dense|mlp\.(linear2|dense_4h_to_h|w2))\.weight$")
_TABLES = re.compile(r"\b(word_embeddings|final_linear)\.weight$")
_SPARED = re.compile(r"\.bias$|layernorm\.|\bnorm\.")


def decays(name: str) -> bool:
    """Whether GPT-NeoX lets a parameter decay: all but biases and norms."""
    return not _SPARED.search(name)


def read_universal(folder: Path, weights: Mapping[str, Lazy]) -> States | None:
    """None if there is none.  Raises FileError for what is missing or is nothing of the kind."""
    home = folder / FOLDER
    if not (home / SETTINGS).is_file():
        return None
    root = getattr(open_file(home / SETTINGS), "root", None)
    groups = root.get("param_groups") if isinstance(root, dict) else None
    if not isinstance(groups, list) or not all(isinstance(g, dict) for g in groups):
        raise FileError("holds no groups of parameters", file=home / SETTINGS)
    known = [group_of(group, home / SETTINGS) for group in groups]
    if odd := sorted(p.name for p in home.iterdir() if p.is_dir() and p.name not in weights):
        raise LayoutError(f"holds a state of {show(odd[0])}, which is no weight", file=str(home))
    roles: dict[str, dict[str, Lazy]] = {role: {} for role in ROLES}
    steps, files, settings = [], [home / SETTINGS], dict[str, Group]()
    for name in weights:
        if name.endswith("inv_freq"):
            continue
        for role, stem in _FILES.items():
            path = home / name / f"{stem}.pt"
            roles[role][name] = _tensor(path)
            files.append(path)
        steps.append(_step(home / name / f"{STEP}.pt"))
        files.append(home / name / f"{STEP}.pt")
        alike = [group for group in known if bool(group.weight_decay) == decays(name)]
        settings[name] = next(iter(alike or known), Group())
    masters = {name: t for name, t in roles[MASTER].items() if weights[name].dtype != "float32"}
    held = {**{role: roles[role] for role in MOMENTS}, **({MASTER: masters} if masters else {})}
    return States({role: {Rank(): t} for role, t in held.items()}, one_step(steps, home), settings, (), tuple(files))


def _tensor(path: Path) -> Lazy:
    if not path.is_file():
        raise FileError("is missing", file=path, hint=f"copy the whole folder; {ALONE}")
    root = getattr(open_file(path), "root", None)
    found = root.get("param") if isinstance(root, dict) else None
    if not isinstance(found, TensorRecord):
        raise FileError("holds no tensor under the key param", file=path)
    return found


def _step(path: Path) -> float:
    if not path.is_file():
        raise FileError("is missing, which says how often the parameter was updated", file=path)
    found = getattr(open_file(path), "root", None)
    if isinstance(found, Lazy):
        return number_of(found, path)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise FileError(f"is {show(found)}, no number of steps", file=path)
    return float(found)


# ------------------------------------------------------------------------------------------------------- writing


def universal_files(tag: str, written: Written, names: Mapping[str, Stored], gated: bool) -> Iterator[OutputFile]:
    """The files of a universal checkpoint beside the model states in the folder `tag`."""
    masters = written.roles[MASTER][Rank()]
    shared = written.shared(names, "DeepSpeed's optimizer")
    for name in names:
        about: dict[str, Any] = {"cat_dim": int(_COLUMNS.search(name) is not None)}
        about |= {"param_n_sub_params": 2} if gated and ".mlp.linear1." in name else {}
        about |= {"vocab_tensor": True} if _TABLES.search(name) else {}
        for role, stem in _FILES.items():
            own = masters.get(name) if role == MASTER else written.roles[role][Rank()][name]
            tensor = (own or names[name]).tensor
            copy = own is None  # an fp32 weight, which the model's states hold too
            yield torch_file(f"{tag}/{FOLDER}/{name}/{stem}.pt", {"param": tensor, **about},
                             frozenset({"param"} if copy else ()))  # fmt: skip
        yield torch_file(f"{tag}/{FOLDER}/{name}/{STEP}.pt", written.step)
    groups = [_group(shared, True), _group(replace(shared, weight_decay=0.0), False)]
    yield torch_file(f"{tag}/{FOLDER}/{SETTINGS}", {"param_groups": groups, "ds_version": DEEPSPEED})
    yield text_file(LATEST, tag.encode())


def _group(group: Group, kind: bool) -> dict[str, Any]:
    return {"name": "weight_decay_params" if kind else "no_weight_decay_params", "lr": group.lr or 0.0,
            "betas": list(group.betas), "eps": group.eps, "weight_decay": group.weight_decay,
            "bias_correction": True}  # fmt: skip
