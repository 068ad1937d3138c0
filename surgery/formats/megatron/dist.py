"""Megatron-LM's `torch_dist` checkpoints: a DCP folder, `common.pt` and `metadata.json` per iteration.

Tensors are stored whole: the files are tied to no parallel sizes, which only `args` remember.  Layers are stacked,
unless a model's layers differ.  Core 0.20 keeps the common state inside the DCP files instead of `common.pt`.
Every module with an `_extra_state` has an object per layer; loaders miss those that are not there, so they are written
(holding nothing).  Source: megatron/core `dist_checkpointing/`, `transformer/transformer_block.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from surgery.containers import Container, open_file
from surgery.containers.dcp import Dcp
from surgery.containers.dcp_writer import dcp_files
from surgery.containers.output import OutputFile, text_file
from surgery.containers.text import read_json
from surgery.containers.torch_writer import torch_file
from surgery.containers.torch_zip import Tree
from surgery.errors import ConfigError, FileError, LayoutError, show
from surgery.formats.base import Checkpoint, Draft, Format, Opened, Options, Place, Ranks, Reading
from surgery.formats.megatron import dist_optimizer, entries, files, rank_buffers
from surgery.formats.megatron.table import dist_table
from surgery.formats.optimizer import States, Written
from surgery.formats.table import Table
from surgery.formats.topology import ONE_RANK, Rank, Topology
from surgery.formats.weave import Parts
from surgery.model.spec import Spec
from surgery.tensors.lazy import Lazy

COMMON = "common_state/shard_0_1"
METADATA = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
            "common_backend_version": 1}  # fmt: skip
_STATES = re.compile(r"^(optimizer|chained_\d+)[._]")
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Common:
    """What is not sharded, where it lies inside the DCP files."""

    entries: Mapping[Any, Any]
    paths: list[Path] = field(default_factory=list)
    globals: list[str] = field(default_factory=list)


def locate(folder: Path) -> Place | None:
    return files.place(folder, files.is_dist)


def read(place: Place, options: Options) -> Opened:
    """A run's latest iteration, or one iteration."""
    where = files.iteration_folder(place.root)
    _check_backend(where)
    dcp = Dcp(where)
    root, holder = _common(where, dcp)
    args = entries.namespace(root, where)
    tensors = {name: t for name, t in dcp.tensors.items() if not _STATES.match(name)}
    if _EMBEDDING not in tensors or len(tensors[_EMBEDDING].shape) != 2:
        hint = "keys under model.module. are of fsdp_dtensor, which is not read" if _is_fsdp(tensors) else None
        raise LayoutError(f"{where}: holds no matrix {_EMBEDDING}", hint=hint)
    norms = "te" if any(".pre_mlp_layernorm." in name for name in tensors) else "local_dist"
    seen = entries.Seen(tensors[_EMBEDDING].shape[0], entries.own_factor(root), 0, dist_table(norms, tensors))
    stacked = any(re.match(r"decoder\.layers\.\D", name) for name in tensors)
    details = {"layers are": "stacked" if stacked else "numbered", "optimizer": _optimizer(dcp)}
    read = [path for path in (place.root / files.TRACKER, where / "metadata.json") if path.is_file()]
    tp, pp, ep, _ = entries.parallel_sizes(args, where)
    return Opened(args, str(where), {Rank(): tensors}, (dcp, holder), tuple(read), seen, ONE_RANK,
                  {**entries.run_details(root, args), **details}, Topology(tp, pp, ep))  # fmt: skip


def _check_backend(where: Path) -> None:
    """Raise FileError for the sharded formats before and beside torch_dist."""
    meta = read_json(where / "metadata.json", "metadata.json")
    backend = meta.get("sharded_backend") if isinstance(meta, dict) else None
    if backend != "torch_dist":
        raise FileError(
            f"says the format {show(backend)}; only torch_dist is read",
            file=where / "metadata.json",
            hint="load it with the Megatron that wrote it and save with --ckpt-format torch_dist",
        )


def _common(where: Path, dcp: Dcp) -> tuple[Mapping[Any, Any], Container]:
    """What is not sharded (the args and counters), and what holds it."""
    path = where / "common.pt"
    if path.is_file():
        file = open_file(path)
        if not isinstance(file, Tree) or not isinstance(file.root, dict):
            raise FileError("is no common state of Megatron", file=path)
        return file.root, file
    if COMMON in dcp.objects:
        held = dcp.objects[COMMON]()
        root = held[0] if isinstance(held, list) and len(held) == 1 else held
        if isinstance(root, dict):
            return root, Common(root)
    if (where / "run_config.yaml").is_file():
        raise ConfigError("is of Megatron-Bridge, which stores no args; it is not read", file=where,
                          hint="export it with Megatron-Bridge itself")  # fmt: skip
    raise ConfigError(f"has neither common.pt nor {COMMON}, which describe the model", file=where,
                      hint="copy or download the whole folder")  # fmt: skip


def _is_fsdp(tensors: Mapping[str, Lazy]) -> bool:
    return any(name.startswith("model.module.") for name in tensors)


def _optimizer(dcp: Dcp) -> str:
    """How much of an optimizer's state there is."""
    states = [tensor for name, tensor in dcp.tensors.items() if _STATES.match(name)]
    if states:
        return f"{len(states)} tensors, {sum(t.nbytes for t in states)} bytes"
    return "in the buffers of ranks" if any(map(rank_buffers.KEY.fullmatch, dcp.objects)) else "none"


def states(place: Place, opened: Opened, reading: Reading, parts: Parts, options: Options) -> States | None:
    dcp, holder = opened.containers
    assert isinstance(dcp, Dcp)
    found = dist_optimizer.read_states(dcp, holder.entries, opened.shards[Rank()])
    return found or rank_buffers.read_states(dcp, opened.config, reading.spec, parts)


def stored_table(opened: Opened, reading: Reading, options: Options) -> Table:
    found: Table = opened.seen.table
    return found


# ------------------------------------------------------------------------------------------------------- writing


def draft(checkpoint: Checkpoint, topology: Topology, options: Options) -> Draft:
    """The iteration's folder and the tracker.  `topology` decides the padding and what `args` remember."""
    spec = checkpoint.spec
    plan = entries.written(checkpoint, topology, options, {"ckpt_format": "torch_dist", "use_dist_ckpt": True})
    plan.topology.layer_counts(spec.layers)
    numbered = spec.experts > 0 and not all(spec.is_moe(i) for i in range(spec.layers))
    norms = "te" if plan.norms == "te" else "local_dist"
    rows = dist_table(norms, (), plan.multiple * plan.topology.tp, numbered=numbered)
    planned = partial(_files, plan, spec, numbered)
    return Draft(plan.args, plan.seen, rows, ONE_RANK, planned, plan.notes, states=planned)


def _files(
    plan: entries.Written, spec: Spec, numbered: bool, ranks: Ranks, written: Written | None = None
) -> Iterable[OutputFile]:
    where, text = files.iteration_name(plan.iteration)
    stored, root = dict(ranks[Rank()]), dict(plan.root)
    if written:
        states, entry = dist_optimizer.stored_states(written, stored, plan.wanted.rates)
        stored |= states
        root |= {"optimizer": entry, "opt_param_scheduler": entries.scheduler(written, plan), "content_metadata": {
            "singleton_local_shards": False, "distrib_optim_sharding_type": dist_optimizer.TYPE,
            "chained_optim_avoid_prefix": True}}  # fmt: skip
    return [
        text_file(files.TRACKER, text.encode()),
        text_file(f"{where}/metadata.json", json.dumps(METADATA).encode()),
        torch_file(f"{where}/common.pt", root),
        *dcp_files(
            f"{where}/",
            {name: s.tensor for name, s in stored.items()},
            {name: [None] for name in extra_states(spec, numbered)},
            copies=frozenset(name for name, s in stored.items() if s.copy),
        ),
    ]


def extra_states(spec: Spec, numbered: bool) -> Iterator[str]:
    """Every `_extra_state` object that any version asks for; loaders take no notice of those they do not know."""
    for layer in range(spec.layers):
        prefix = f"decoder.layers.{layer}." if numbered else "decoder.layers."
        at, of = ("", "") if numbered else (f"{layer}.", f"{spec.layers}.")
        for module in _modules(spec, layer):
            if ".experts.experts." in module:
                for expert in range(spec.experts):
                    yield f"{prefix}{module}._extra_state/shard_{at}{expert}_{of}{spec.experts}"
            else:
                yield f"{prefix}{module}._extra_state/shard_{at[:-1] or 0}_{of[:-1] or 1}"
    yield "decoder.final_layernorm._extra_state/shard_0_1"


def _modules(spec: Spec, layer: int) -> list[str]:
    found = [f"self_attention.{name}" for name in ("linear_qkv", "linear_proj", "core_attention")]
    if spec.qk_norm:
        found += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    if not spec.is_moe(layer):
        return [*found, "mlp.linear_fc1", "mlp.linear_fc2"]
    found += ["pre_mlp_layernorm", "mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2"]
    return found + ["mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"] * (spec.shared_ffn > 0)


FORMAT = Format(
    name="megatron-dist",
    who="Megatron",
    title="Megatron-LM, `torch_dist` format (.metadata, __R_N.distcp, common.pt)",
    locate=locate,
    read=read,
    spec=entries.spec,
    table=stored_table,
    draft=draft,
    flags=("tp", "pp", "vpp", "ep"),
    options=entries.OPTIONS,
    entries=entries.ENTRIES,
    states=states,
    masters=True,
)
