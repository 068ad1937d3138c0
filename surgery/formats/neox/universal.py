"""Adam's state as DeepSpeed's universal checkpoints hold it: a folder of whole tensors for each parameter.

    states = read_universal(folder, shards)
    yield from universal_files("global_step1000", written, whole, spec, "C")

zero/NAME/fp32.pt, exp_avg.pt, exp_avg_sq.pt     {"param": whole tensor, and how tensor parallelism divides it}
zero/NAME/step.pt                                the updates, as DeepSpeed's FusedAdam counts them: a number
zero/optimizer_state.pt                          settings of groups (what decays, then what does not); Apex counts there
latest_universal                                 the folder's name

Ranks take what they need of a whole tensor: all of it, if that is their shape; else an equal part along `cat_dim`; of
each of `param_n_sub_params` equal blocks, or of each block in `sub_param_shape` (queries, keys, values), such a part.
Source: DeepSpeed checkpoint/ds_to_universal.py, checkpoint/universal_checkpoint.py, runtime/base_optimizer.py.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from surgery.containers import open_file
from surgery.containers.output import OutputFile, text_file
from surgery.containers.pickles.records import Obj, TensorRecord
from surgery.containers.torch_writer import Record, torch_file
from surgery.errors import FileError, LayoutError, show, some
from surgery.formats.optimizer import (
    ALONE,
    MASTER,
    MOMENTS,
    ROLES,
    Group,
    Optimizer,
    States,
    Written,
    decay_changes,
    group_of,
    one_step,
)
from surgery.formats.table import Table
from surgery.formats.topology import Rank
from surgery.formats.torch_states import STEP, number_of
from surgery.formats.weave import Shards, Stored
from surgery.model.spec import Spec
from surgery.tensors.lazy import Concat, Fill, Lazy, Shape, Slice

FOLDER, SETTINGS, LATEST = "zero", "optimizer_state.pt", "latest_universal"
BLOCKS = ("deepspeed.checkpoint.universal_checkpoint", "SubparamShape")
DEEPSPEED = "0.16.0"  # which wrote this form; releases refuse states of ZeRO before 0.3.17
_FILES = {MASTER: "fp32", **{role: role for role in MOMENTS}}
_COLUMNS = re.compile(r"\.(attention\.dense|mlp\.(linear2|dense_4h_to_h|w2))\.weight$")
_TABLES = re.compile(r"\b(word_embeddings|final_linear)\.weight$")
UNIVERSAL = (
    "the optimizer's state is written as DeepSpeed's universal checkpoint: it is loaded with checkpoint: "
    "{load_universal: true} in the configuration; take finetune and no_load_optim out of training.yml. The scheduler "
    "is at the rate of the last update, held constant: override_lr_scheduler: true takes yours"
)
_SPARED = re.compile(r"\.bias$|layernorm\.|\bnorm\.")


def decays(name: str) -> bool:
    """Whether GPT-NeoX lets a parameter decay: all but biases and norms."""
    return not _SPARED.search(name)


def read_universal(folder: Path, shards: Shards) -> States | None:
    """None if there is none.  Raises FileError for what is missing or is nothing of the kind."""
    home = folder / FOLDER
    if not (home / SETTINGS).is_file():
        return None
    root = getattr(open_file(home / SETTINGS), "root", None)
    groups = root.get("param_groups") if isinstance(root, dict) else None
    if not isinstance(groups, list) or not all(isinstance(g, dict) for g in groups):
        raise FileError("holds no groups of parameters", file=home / SETTINGS)
    known = [group_of(group, home / SETTINGS) for group in groups]
    weights = shards[Rank()]
    if odd := sorted(p.name for p in home.iterdir() if p.is_dir() and p.name not in weights):
        raise LayoutError(f"holds a state of {show(odd[0])}, which is no weight", file=str(home))
    roles: dict[str, dict[Rank, dict[str, Lazy]]] = {role: {rank: {} for rank in shards} for role in ROLES}
    steps, files, settings = [], [home / SETTINGS], dict[str, Group]()
    for name in weights:
        if name.endswith("inv_freq"):
            continue
        for role, stem in _FILES.items():
            path = home / name / f"{stem}.pt"
            about = _about(path)
            for rank, shard in shards.items():
                roles[role][rank][name] = share(about, shard[name].shape, rank.tp, len(shards), path)
            files.append(path)
        counted = home / name / f"{STEP}.pt"
        steps += [_step(counted)] if counted.is_file() else _steps(groups, counted)
        files += [counted] if counted.is_file() else []
        alike = [group for group in known if bool(group.weight_decay) == decays(name)]
        settings[name] = next(iter(alike or known), Group())
    return States(roles, one_step(steps, home), settings, (), tuple(files))


def _about(path: Path) -> Mapping[str, Any]:
    """A whole tensor, and how it is divided."""
    if not path.is_file():
        raise FileError("is missing", file=path, hint=f"copy the whole folder; {ALONE}")
    root = getattr(open_file(path), "root", None)
    if not isinstance(root, dict) or not isinstance(root.get("param"), TensorRecord):
        raise FileError("holds no tensor under the key param", file=path)
    return root


def share(about: Mapping[str, Any], shape: Shape, rank: int, ranks: int, path: Path) -> Lazy:
    """What DeepSpeed gives a tensor-parallel rank, whose own tensor has this shape.  Raises LayoutError if the tensor
    cannot be divided so."""
    whole: Lazy = about["param"]
    if whole.shape == shape:
        return whole
    dim, sizes = _blocks(about, whole.shape)
    if about.get("vocab_tensor") and whole.shape[1:] == shape[1:] and whole.shape[0] < shape[0] * ranks:
        whole = Concat((whole, Fill((shape[0] * ranks - whole.shape[0], *shape[1:]), whole.dtype)), 0)
        sizes = whole.shape[:1]
    if not sizes or sum(sizes) != whole.shape[dim] or any(size % ranks for size in sizes):
        raise LayoutError(f"holds {list(whole.shape)[:8]} in blocks of {list(sizes)[:8]}, which {ranks} ranks cannot "
                          "divide", file=str(path), hint=ALONE)  # fmt: skip
    starts = itertools.accumulate(sizes, initial=0)
    pieces = [Slice(whole, dim, at + size * rank // ranks, at + size * (rank + 1) // ranks)
              for at, size in zip(starts, sizes, strict=False)]  # fmt: skip
    return Concat(pieces, dim) if len(pieces) > 1 else pieces[0]


def _blocks(about: Mapping[str, Any], shape: Shape) -> tuple[int, Sequence[int]]:
    """The dimension that is divided, and the blocks in it; no blocks where that is not said in a way that is known."""
    dim, count = about.get("cat_dim", 0), about.get("param_n_sub_params", 1)
    if isinstance(blocks := about.get("sub_param_shape"), Obj):
        fields = dict(zip(("patterns", "shape", "partition_dim"), blocks.args, strict=False)) | blocks.state
        dim, said = fields.get("partition_dim"), fields.get("shape")
        if _is_place(dim, shape) and isinstance(said, tuple) and len(said) == len(shape) and _are_counts(said[dim]):
            return dim, said[dim]
        return 0, ()
    if not _is_place(dim, shape) or not _are_counts([count]) or shape[dim] % count:
        return 0, ()
    return dim, [shape[dim] // count] * count


def _is_place(dim: object, shape: object) -> TypeGuard[int]:
    return type(dim) is int and isinstance(shape, tuple) and 0 <= dim < len(shape)


def _are_counts(sizes: object) -> bool:
    return isinstance(sizes, (tuple, list)) and all(type(n) is int and 0 < n < 1 << 40 for n in sizes)


def _step(path: Path) -> float:
    return _count(getattr(open_file(path), "root", None), path)


def _steps(groups: Sequence[Mapping[str, Any]], path: Path) -> list[float]:
    """What groups count, as of Apex's optimizer, whose states have no steps."""
    if any(STEP not in group for group in groups):
        raise FileError("is missing, which says how often the parameter was updated", file=path)
    return [_count(group[STEP], path) for group in groups]


def _count(found: object, path: Path) -> float:
    if isinstance(found, Lazy):
        return number_of(found, path)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise FileError(f"is {show(found)}, no number of steps", file=path)
    return float(found)


# ------------------------------------------------------------------------------------------------------- writing


def universal_files(
    tag: str, written: Written, names: Mapping[str, Stored], spec: Spec, qkv: str
) -> Iterator[OutputFile]:
    """The files of a universal checkpoint beside the model states in the folder `tag`.

    `names` are the whole weights, `qkv` is how the release packs queries, keys and values.
    """
    masters = written.roles[MASTER][Rank()]
    shared = written.shared(names, "DeepSpeed's optimizer")
    for name in names:
        about = _divided(name, names[name].tensor.shape, spec, qkv)
        for role, stem in _FILES.items():
            own = masters.get(name) if role == MASTER else written.roles[role][Rank()][name]
            tensor = (own or names[name]).tensor
            copy = own is None  # an fp32 weight, which the model's states hold too
            yield torch_file(f"{tag}/{FOLDER}/{name}/{stem}.pt", {"param": tensor, **about},
                             frozenset({"param"} if copy else ()))  # fmt: skip
        yield torch_file(f"{tag}/{FOLDER}/{name}/{STEP}.pt", written.step)
    groups = [_group(shared, True, written.step), _group(replace(shared, weight_decay=0.0), False, written.step)]
    yield torch_file(f"{tag}/{FOLDER}/{SETTINGS}", {"param_groups": groups, "ds_version": DEEPSPEED})
    yield text_file(LATEST, tag.encode())


def _divided(name: str, shape: Shape, spec: Spec, qkv: str) -> dict[str, Any]:
    """How ranks divide a whole tensor."""
    about: dict[str, Any] = {"cat_dim": int(_COLUMNS.search(name) is not None)}
    if spec.glu and ".mlp.linear1." in name:
        about["param_n_sub_params"] = 2
    if _TABLES.search(name):
        about["vocab_tensor"] = True
    if qkv == "C" and ".query_key_value." in name:
        sizes = tuple(heads * spec.head_dim for heads in (spec.heads, spec.kv_heads, spec.kv_heads))
        about["sub_param_shape"] = Record(*BLOCKS, ((), (sizes, *shape[1:]), 0))
    return about


def _group(group: Group, kind: bool, step: int) -> dict[str, Any]:
    return {"name": "weight_decay_params" if kind else "no_weight_decay_params", "lr": group.lr or 0.0,
            "betas": list(group.betas), "eps": group.eps, "weight_decay": group.weight_decay,
            "bias_correction": True, "step": step}  # fmt: skip


def notes_of(found: Optimizer, table: Table) -> list[str]:
    """What somebody who loads a universal checkpoint has to know."""
    changed = sorted({part for _, part in decay_changes(found, table.rows, lambda name: not decays(name))})
    told = f"GPT-NeoX decays all but norms and biases: {some(changed, 20)} did otherwise before"
    return [UNIVERSAL, *([told] if changed else [])]
