"""Megatron-LM's `torch_dist` checkpoints: a DCP folder, `common.pt` and `metadata.json` per iteration.

Tensors are stored whole: the files are tied to no parallel sizes, which only `args` remember.  Layers are stacked,
unless a model's layers differ.  Core 0.20 keeps the common state inside the DCP files instead of `common.pt`.
Every module with an `_extra_state` has an object per layer; loaders miss those that are not there, so they are written
(holding nothing).  Source: megatron/core `dist_checkpointing/`, `transformer/transformer_block.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from surgery.containers import open_file
from surgery.containers.dcp import Dcp
from surgery.containers.dcp_writer import dcp_files
from surgery.containers.output import text_file
from surgery.containers.text import read_json
from surgery.containers.torch_writer import torch_file
from surgery.containers.torch_zip import Tree
from surgery.errors import ConfigError, FileError, LayoutError, show
from surgery.formats.base import Checkpoint, Format, Options, Output, number
from surgery.formats.megatron import entries
from surgery.formats.megatron import folder as folders
from surgery.formats.megatron.config import read_args
from surgery.formats.megatron.rows import dist_table
from surgery.formats.table import ONE_RANK, Rank, Topology, gather, spread
from surgery.model.spec import Spec
from surgery.tensors.lazy import Lazy

COMMON = "common_state/shard_0_1"
METADATA = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
            "common_backend_version": 1}  # fmt: skip
_STATES = re.compile(r"^(optimizer|chained_\d+)[._]")
_EMBEDDING = "embedding.word_embeddings.weight"


def recognise(folder: Path) -> bool:
    found = folders.latest(folder)
    return found is not None and folders.is_dist(found)


def open_dist(folder: Path, options: Options) -> Checkpoint:
    """A run or one iteration of it.  Raises SurgeryError naming everything that does not fit."""
    where = folders.iteration_folder(folder)
    _check_backend(where)
    dcp = Dcp(where)
    root, names, files = _common(where, dcp)
    args = entries.namespace(root, where)
    tensors = {name: t for name, t in dcp.tensors.items() if not _STATES.match(name)}
    if _EMBEDDING not in tensors or len(tensors[_EMBEDDING].shape) != 2:
        hint = "keys under model.module. are of fsdp_dtensor, which is not read" if _is_fsdp(tensors) else None
        raise LayoutError(f"{where}: holds no matrix {_EMBEDDING}", hint=hint)
    factor = number(options, "rope_factor") or entries.own_factor(root)
    found = read_args(args, str(where), tensors[_EMBEDDING].shape[0], factor)
    norms = "te" if any(".pre_mlp_layernorm." in name for name in tensors) else "local_dist"
    gathered = gather(dist_table(norms, tensors), {Rank(): tensors}, found.spec, ONE_RANK)
    tp, pp, ep, _ = entries.parallel_sizes(args, where)
    stacked = any(re.match(r"decoder\.layers\.\D", name) for name in tensors)
    return Checkpoint(
        format="megatron-dist",
        path=folder,
        spec=found.spec,
        parts=gathered.parts,
        topology=Topology(tp, pp, ep),
        config=args,
        files=(where / ".metadata", *(Path(f.path) for f in dcp.files.values()), *files),
        globals=tuple(sorted({*dcp.globals, *names})),
        ignored=gathered.ignored | _left_out(dcp, root),
        notes=found.notes,
        details={
            **entries.run_details(root, args),
            "layers are": "stacked" if stacked else "numbered",
            "optimizer": _optimizer(dcp),
        },
    )


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


def _common(where: Path, dcp: Dcp) -> tuple[Mapping[Any, Any], Collection[str], list[Path]]:
    """What is not sharded: the args and counters; the names that its pickle mentions; its file."""
    path = where / "common.pt"
    if path.is_file():
        file = open_file(path)
        if not isinstance(file, Tree) or not isinstance(file.root, dict):
            raise FileError("is no common state of Megatron", file=path)
        return file.root, file.globals, [path]
    if COMMON in dcp.objects:
        held = dcp.objects[COMMON]()
        root = held[0] if isinstance(held, list) and len(held) == 1 else held
        if isinstance(root, dict):
            return root, (), []
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
    return f"{len(states)} tensors, {sum(t.nbytes for t in states)} bytes" if states else "none"


def _left_out(dcp: Dcp, root: Mapping[Any, Any]) -> dict[str, str]:
    """Everything that is not the model, each kind of entry once."""
    out = {}
    for name in dcp.tensors:
        if match := _STATES.match(name):
            out[match[1]] = entries.STATES["optimizer"]
    for name in dcp.objects:
        kind = name.partition("/")[0]
        if "_extra_state" in kind:
            out["_extra_state"] = "Transformer Engine's own state (FP8 scales), no weight"
        elif name != COMMON:
            out[kind] = entries.STATES.get(kind.removesuffix("_state"), entries.STATES.get(kind, "no tensor"))
    for key in root:
        if key not in entries.READ and key not in ("content_metadata",):
            out[str(key)] = entries.STATES.get(key, "no part of the model")
    return out


# ------------------------------------------------------------------------------------------------------- writing


def plan(checkpoint: Checkpoint, topology: Topology, options: Options) -> Output:
    """The iteration's folder and the tracker.  `topology` decides the padding and what `args` remember."""
    spec, carried = checkpoint.spec, checkpoint.details
    norms = entries.chosen(options, "spec", carried.get("layer names"))
    experts = entries.chosen(options, "experts", carried.get("experts"))
    entries.check_heads(spec, topology.tp)
    topology = entries.with_experts(spec, topology, options)
    topology.layer_counts(spec.layers)
    numbered = spec.experts > 0 and not all(spec.is_moe(i) for i in range(spec.layers))
    multiple = entries.whole_number(options, "vocab_multiple")
    iteration = folders.chosen_iteration(options, carried.get("iteration", carried.get("step")))
    args = {"transformer_impl": entries.IMPL[norms], **entries.EXPERT_ARGS[experts], "ckpt_format": "torch_dist",
            "use_dist_ckpt": True}  # fmt: skip
    root = entries.root_entries(checkpoint, topology, multiple, args, iteration)
    stored_norms = "te" if norms == "te" else "local_dist"
    dialect = dist_table(stored_norms, (), multiple * topology.tp, numbered=numbered)
    tensors = {name: s.tensor for name, s in spread(dialect, checkpoint.parts, spec, ONE_RANK)[Rank()].items()}
    where, text = folders.iteration_name(iteration)
    files = [
        text_file(folders.TRACKER, text.encode()),
        text_file(f"{where}/metadata.json", json.dumps(METADATA).encode()),
        torch_file(f"{where}/common.pt", root),
        *dcp_files(f"{where}/", tensors, {name: [None] for name in extra_states(spec, numbered)}),
    ]
    return Output(tuple(files), tuple(entries.notes_of(checkpoint, topology, multiple)))


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
    title="Megatron-LM, `torch_dist` format (.metadata, __R_N.distcp, common.pt)",
    flags=("tp", "pp", "vpp", "ep"),
    options=entries.OPTIONS,
    recognise=recognise,
    open=open_dist,
    plan=plan,
)
