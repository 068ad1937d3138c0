"""Adam's state in Megatron's legacy files: numbered in model_optim_rng.pt, or flat in distrib_optim.pt beside it.

    states = read_states(ranks, args)          # ranks: {Rank(): RankFile}

Without the distributed optimizer parameters are numbered through the groups, those of a group in the order of `model`;
masters stand in `fp32_from_fp16_params`.  With it the parameters of a dtype lie in one buffer, last ones first, each at
a multiple of 64, in buckets that follow each other without gaps.  Experts of expert parallelism have an optimizer of
their own, the second in a list.  Which parameters decay is told by `wd_mult` and their dimensions.
Source: megatron/core `optimizer/__init__.py`, `optimizer/optimizer.py`, `optimizer/distrib_optimizer.py`,
`distributed/param_and_grad_buffer.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from surgery.containers import open_file
from surgery.containers.pickles.records import Global
from surgery.errors import FileError, LayoutError, NoStateError, SurgeryError, show, some
from surgery.formats.flat import aligned, cut
from surgery.formats.megatron.files import RankFile
from surgery.formats.optimizer import ALONE, MASTER, MOMENTS, ROLES, Group, M, States, V, group_of, one_step
from surgery.formats.topology import Rank
from surgery.formats.torch_states import Fields, step_of, tensor_of
from surgery.tensors.lazy import Lazy, Shape

FLAT = "distrib_optim.pt"
KEYS = ("optimizer", "optimizer_state_dict")  # the second: of old releases
MASTERS = ("fp32_from_fp16_params", "fp32_from_fp16")
ALIGN = 64
_NO_PARAMETER = re.compile(r"\.expert_bias$|inv_freq$|tokens_per_expert$")
BUFFERS = {"param": MASTER, M: M, V: V}


@dataclass(frozen=True)
class Parameter:
    """A parameter of a rank: in which chunk, its name there, and the weight."""

    chunk: int
    name: str
    weight: Lazy

    @property
    def decays(self) -> bool:
        return decays(self.name, self.weight.shape)

    @property
    def trained(self) -> bool:
        """Whether it is a parameter at all, and no buffer."""
        return not _NO_PARAMETER.search(self.name)


def decays(name: str, shape: Shape) -> bool:
    """Whether Megatron lets a parameter decay: matrices that are no bias."""
    return len(shape) > 1 and not name.endswith(".bias")


@dataclass
class Found:
    """What was found so far, over all ranks."""

    roles: dict[str, dict[Rank, dict[str, Lazy]]] = field(default_factory=lambda: {role: {} for role in ROLES})
    steps: list[float] = field(default_factory=list)
    groups: dict[str, Group] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    def put(self, role: str, rank: Rank, parameter: Parameter, tensor: Lazy) -> None:
        self.roles[role].setdefault(rank._replace(chunk=parameter.chunk), {})[parameter.name] = tensor


def read_states(ranks: Mapping[Rank, RankFile], args: Fields) -> States | None:
    """None if no rank has a state.  Raises SurgeryError if a rank's state does not fit its weights."""
    found = Found()
    held = {rank: _optimizers(file) for rank, file in ranks.items()}
    if not any(held.values()):
        return None
    for rank, file in ranks.items():
        optimizers = held[rank]
        if not optimizers:
            raise FileError("holds no optimizer's state, but other ranks do", file=file.path)
        for which, optimizer in enumerate(optimizers):
            mine = _parameters(file, which if len(optimizers) > 1 else None)
            inner = optimizer.get("optimizer", optimizer)
            groups = groups_of(inner, file.path)
            if inner.get("state"):
                _numbered(found, rank, mine, optimizer, inner["state"], groups, file.path)
            else:
                _flat(found, rank, mine, groups, file.path.with_name(FLAT), which, bucket_size(args, rank))
    roles = {role: shards for role, shards in found.roles.items() if shards}
    return States(roles, one_step(found.steps, next(iter(ranks.values())).path), found.groups,
                  files=tuple(dict.fromkeys(found.files)))  # fmt: skip


def _optimizers(file: RankFile) -> list[Fields]:
    """The optimizers of a rank: one, or those of dense and of expert parameters."""
    value = next((file.root[key] for key in KEYS if file.root.get(key)), None)
    found = value if isinstance(value, list) else [value] if value is not None else []
    if not all(isinstance(optimizer, dict) for optimizer in found) or len(found) > 2:
        raise NoStateError(f"holds an optimizer of an unknown form: {show(found)}", file=file.path)
    return found


def _parameters(file: RankFile, which: int | None) -> list[Parameter]:
    """What is trained, in the order of the model; of two optimizers, that of the experts is the second."""
    every = (Parameter(v, name, weight) for v, chunk in enumerate(file.chunks) for name, weight in chunk.items())
    return trained_by(which, every)


def trained_by(which: int | None, parameters: Iterable[Parameter]) -> list[Parameter]:
    """Those that an optimizer trains: all (None), or of two the dense ones (0) and the experts (1)."""
    return [p for p in parameters if p.trained and (which is None or (".experts." in p.name) == bool(which))]


def groups_of(inner: object, path: Path) -> list[Fields]:
    groups = inner.get("param_groups") if isinstance(inner, dict) else None
    if not isinstance(groups, list) or not all(isinstance(g, dict) for g in groups):
        raise NoStateError("holds an optimizer without groups of parameters", file=path)
    return groups


# ------------------------------------------------------------------------------------------ numbered parameters


def _numbered(
    found: Found, rank: Rank, mine: Sequence[Parameter], optimizer: Fields, states: object, groups: Sequence[Fields],
    path: Path,
) -> None:  # fmt: skip
    """States by number, masters by group."""
    if not isinstance(states, dict):
        raise NoStateError("holds an optimizer's state of an unknown form", file=path)
    masters = next((optimizer[key] for key in MASTERS if key in optimizer), None)
    owners = _divided(mine, groups, path)
    for i, (group, owned) in enumerate(zip(groups, owners, strict=True)):
        settings = group_of(group, path)
        for number, parameter in zip(group["params"], owned, strict=True):
            fields = states.get(number) if type(number) is int else None
            if not isinstance(fields, dict):
                raise NoStateError(f"has no state of {show(parameter.name)}", file=path, hint=ALONE)
            found.steps.append(step_of(fields, group, path))
            found.groups[parameter.name] = settings
            for role in MOMENTS:
                found.put(role, rank, parameter, tensor_of(fields, role, path))
        rounded = [p for p in owned if p.weight.dtype != "float32"]
        own = masters[i] if isinstance(masters, list) and i < len(masters) else []
        if not isinstance(own, list) or len(own) != len(rounded):
            raise FileError(f"does not hold a master for each of the {len(rounded)} weights of group {i}", file=path)
        for parameter, master in zip(rounded, own, strict=True):
            found.put(MASTER, rank, parameter, tensor_of({MASTER: master}, MASTER, path))
    found.files.append(path)


def _divided(mine: Sequence[Parameter], groups: Sequence[Fields], path: Path) -> list[list[Parameter]]:
    """The parameters of each group.  Newer runs may let the norms of q and k decay: the numbers tell."""
    for spared in (False, True):
        out = [[p for p in mine if _belongs(p, group, groups, spared)] for group in groups]
        counts = [len(group["params"]) if isinstance(group.get("params"), list) else -1 for group in groups]
        if [len(owned) for owned in out] == counts:
            return out
    raise NoStateError(f"groups {counts} parameters, its model has {[len(owned) for owned in out]} of these kinds",
                       file=path, hint=ALONE)  # fmt: skip


def _belongs(p: Parameter, group: Fields, groups: Sequence[Fields], spared: bool) -> bool:
    """Whether a parameter is of a group, by weight decay, experts, and a rate of the embeddings' own."""
    decays = p.decays or (spared and re.search(r"\.[qk]_layernorm\.weight$", p.name) is not None)
    told = len({bool(g.get("wd_mult", 1.0)) for g in groups}) > 1  # else all of them do alike
    if told and bool(group.get("wd_mult", 1.0)) != decays:
        return False
    apart = len({bool(g.get("is_expert_parallel")) for g in groups}) > 1
    if apart and bool(group.get("is_expert_parallel")) != (".experts." in p.name):
        return False
    if any(g.get("is_decoupled_lr") for g in groups):
        return bool(group.get("is_decoupled_lr")) == (re.match(r"embedding\.|output_layer\.", p.name) is not None)
    return True


# ------------------------------------------------------------------------------------------------- flat buffers


def _flat(
    found: Found, rank: Rank, mine: Sequence[Parameter], groups: Sequence[Fields], path: Path, which: int,
    bucket: int | None,
) -> None:  # fmt: skip
    """The buffers of the distributed optimizer: one for each chunk and dtype."""
    if not path.is_file():
        kept = any(path.parent.parent.glob(f"*/{FLAT}"))  # those of other ranks
        kind: type[SurgeryError] = FileError if kept else NoStateError
        raise kind("is missing, which holds the optimizer's state", file=path, hint=f"copy it; {ALONE}")
    root = getattr(open_file(path), "root", None)
    root = root[which] if isinstance(root, list) and which < len(root) else root
    put_coalesced(found, rank, mine, buffers_of(root, path), bucket, path)
    put_settings(found, mine, groups, path)
    found.files.append(path)


def buffers_of(root: object, path: Path) -> list[tuple[str, Fields]]:
    """(dtype of the parameters, tensors) of every buffer, in which buckets follow each other without gaps."""
    if not isinstance(root, dict) or not root.get("buckets_coalesced"):
        raise NoStateError("is of a release before 2024-05, which laid its buffers out in other ways: it is not read",
                           file=path, hint=ALONE)  # fmt: skip
    return [pair for i in sorted(k for k in root if type(k) is int) for pair in _pairs(root[i])]


def wanted_buffers(mine: Sequence[Parameter]) -> Iterator[tuple[str, list[Parameter]]]:
    """(dtype, parameters) of the buffers that a rank has: one for each chunk and dtype."""
    for chunk in dict.fromkeys(p.chunk for p in mine):
        for dtype in dict.fromkeys(p.weight.dtype for p in mine if p.chunk == chunk):
            yield dtype, [p for p in mine if p.chunk == chunk and p.weight.dtype == dtype]


def put_coalesced(
    found: Found, rank: Rank, mine: Sequence[Parameter], buffers: Sequence[tuple[str, Fields]], bucket: int | None,
    path: Path,
) -> None:  # fmt: skip
    """The masters and moments in a rank's buffers."""
    wanted = list(wanted_buffers(mine))
    if [dtype for dtype, _ in wanted] != [dtype for dtype, _ in buffers]:
        raise LayoutError(f"has buffers of {some(d for d, _ in buffers)}, the model {some(d for d, _ in wanted)}",
                          file=path, hint=ALONE)  # fmt: skip
    for (_, owned), (_, fields) in zip(wanted, buffers, strict=True):
        tensors = {role: tensor_of(fields, key, path) for key, role in BUFFERS.items()}
        places = _places(owned, tensors[M].shape, bucket, path)
        for parameter in owned:
            for role, buffer in tensors.items():
                found.put(role, rank, parameter, cut(buffer, places[parameter.name], parameter.weight.shape))


def put_settings(found: Found, mine: Sequence[Parameter], groups: Sequence[Fields], path: Path) -> None:
    """What the groups of a distributed optimizer say of a rank's parameters: they list none, and count the steps."""
    for group in groups:
        found.steps.append(step_of({}, group, path))
        settings = group_of(group, path)
        found.groups |= dict.fromkeys((p.name for p in mine if _belongs(p, group, groups, False)), settings)


def _pairs(buffer: object) -> Iterator[tuple[str, Fields]]:
    """(dtype of the parameters, tensors) of one buffer."""
    for key, fields in buffer.items() if isinstance(buffer, dict) else ():
        kind = key[0] if isinstance(key, tuple) and key else None
        if isinstance(kind, Global) and isinstance(fields, dict):
            yield kind.name, fields


def _places(mine: Sequence[Parameter], size: Shape, bucket: int | None, path: Path) -> dict[str, int]:
    """Where each parameter begins: by the layout of a release, or of a run with overlapping buckets, that has as many
    elements.  The masters prove it."""
    shapes = [(p.name, p.weight.shape) for p in reversed(mine)]
    tried = [aligned(shapes, ALIGN), aligned(shapes, ALIGN, bucket), aligned(shapes, 1)]
    places = next((found for found, total in tried if size == (total,)), None)
    if places is None:
        count = sum(math.prod(shape) for _, shape in shapes)
        raise NoStateError(f"has a buffer of {list(size)[:8]} elements, which {len(shapes)} parameters of {count:,} "
                           "do not fill in any way that is known", file=path, hint=ALONE)  # fmt: skip
    return places


def bucket_size(args: Fields, rank: Rank) -> int | None:
    """How many elements close a bucket: only where gradients are reduced meanwhile, and on the first stage."""
    if not args.get("overlap_grad_reduce") or rank.pp > 0:
        return None
    said, dp = args.get("ddp_bucket_size"), args.get("data_parallel_size")
    return said if type(said) is int and said > 0 else max(40_000_000, 1_000_000 * (dp if type(dp) is int else 1))
