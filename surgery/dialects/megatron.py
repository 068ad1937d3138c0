"""Megatron-LM's legacy checkpoints: `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`, one file per model-parallel rank.

The sizes are decided by the `args` in the files, never by the folders' names alone (`mp_rank_00_001` may be a
pipeline or an expert rank); how many layers a stage holds is counted.  Layouts: `megatron_rows`; the model's own
measures: `megatron_args`.  Optimizer, scheduler and random states are named and left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.anatomy import Spec
from surgery.containers import open_file
from surgery.containers.output import OutputFile, text_file
from surgery.containers.records import Obj, flatten
from surgery.containers.torch_writer import Record, torch_file
from surgery.containers.torch_zip import Tree
from surgery.dialect import Dialect, Rank, Stored, Topology, gather, spread
from surgery.dialects import megatron_folder as folders
from surgery.dialects.megatron_args import BUILT_IN_FACTOR, read_args, write_args
from surgery.dialects.megatron_rows import OLD_NAMES, precore_table, table
from surgery.errors import ConfigError, FileError, LayoutError, UsageError, show
from surgery.formats import Checkpoint, Format, Option, Options, Output, number
from surgery.lazy import Extent, Lazy

STATES = {
    "optimizer": "the optimizer's state, which is not converted",
    "opt_param_scheduler": "the scheduler's state, which is not converted",
    "lr_scheduler": "the scheduler's state, which is not converted",
    "rng_state": "random states, which are not converted",
    "rerun_state_machine": "the trainer's own state",
}
EXTRA = "Transformer Engine's own state (FP8 scales), no weight"
# modules that carry an _extra_state in every version; Transformer Engine's attention does so too
_LINEAR = re.compile(r"^(.*\.(?:linear_qkv|linear_proj|linear_fc1|linear_fc2)|output_layer)\.weight\d*$")


@dataclass(frozen=True)
class RankFile:
    """One opened rank: its args' attributes, and the tensors of each virtual-pipeline chunk."""

    path: Path
    root: Mapping[Any, Any]
    globals: tuple[str, ...]
    args: Mapping[str, Any]
    chunks: tuple[dict[str, Lazy], ...]


def recognise(folder: Path) -> bool:
    found = folders.latest(folder)
    return found is not None and (folders.is_legacy(found) or not found.is_dir())


def open_megatron(folder: Path, options: Options) -> Checkpoint:
    """A run or one iteration of it.  Raises SurgeryError naming everything that does not fit."""
    where = folders.iteration_folder(folder)
    first = _open_rank(folders.model_file(min(p for p in where.glob("mp_rank_*") if p.is_dir())))
    topology = _topology(first)
    ranks = {rank: _open_rank(path) for rank, path in folders.rank_files(where, topology).items()}
    _one_save(ranks)
    counts = [_count(ranks[Rank(pp=pp)].chunks[v]) for v in range(topology.vpp) for pp in range(topology.pp)]
    rows = ranks[Rank()].chunks[0]
    precore = any(name.startswith("language_model.") for name in rows)
    vocab = _rows(rows, "language_model." * precore + "embedding.word_embeddings.weight", where) * topology.tp
    factor = number(options, "rope_factor") or own_factor(first.root)
    found = read_args(first.args, str(first.path), vocab, factor)
    topology = replace(topology, stages=folders.stage_counts(counts, found.spec.l, where))
    dialect, details = _dialect(first, ranks, found.spec, precore)
    check_heads(found.spec, topology.tp)
    shards = {rank._replace(chunk=v): file.chunks[v] for rank, file in ranks.items() for v in range(topology.vpp)}
    gathered = gather(dialect, shards, found.spec, topology)
    ignored = {re.sub(r"\d+", "N", name): why for name, why in gathered.ignored.items()} | _states(first)
    return Checkpoint(
        format="megatron",
        path=folder,
        spec=found.spec,
        parts=gathered.parts,
        topology=topology,
        config=first.args,
        files=tuple(file.path for file in ranks.values()),
        globals=tuple(sorted({name for file in ranks.values() for name in file.globals})),
        ignored=ignored,
        notes=found.notes,
        details={**run_details(first.root, first.args), **details},
    )


def _open_rank(path: Path) -> RankFile:
    file = open_file(path)
    if not isinstance(file, Tree) or not isinstance(file.root, dict):
        raise FileError("is no checkpoint of a Megatron rank", file=path)
    root = file.root
    keys = ["model"] if "model" in root else [f"model{i}" for i in range(len(root)) if f"model{i}" in root]
    if not keys:
        raise FileError(f"holds no model, only {show(', '.join(map(str, root)))}", file=path)
    chunks = tuple(tensors_of(root[key], path) for key in keys)
    return RankFile(path, root, tuple(file.globals), namespace(root, path), chunks)


def namespace(root: Mapping[Any, Any], file: Path) -> Mapping[str, Any]:
    """The attributes of `args`.  Raises ConfigError if there is none."""
    args = root.get("args")
    found = args.state if isinstance(args, Obj) else args
    if not isinstance(found, dict) or not all(type(k) is str for k in found):
        raise ConfigError("holds no args, which describe the model", file=file,
                          hint="checkpoints of Megatron-Bridge and of programs of one's own are not read")  # fmt: skip
    return found


def tensors_of(model: object, file: Path) -> dict[str, Lazy]:
    """The tensors of a (nested) state dict by dotted name.  Raises FileError if one is no plain tensor."""
    out: dict[str, Lazy] = {}
    try:
        for name, leaf in flatten(model):
            name = name.removeprefix("module.")
            for old, new in OLD_NAMES if "language_model." in name else ():
                name = re.sub(old, new, name)
            if isinstance(leaf, Extent):
                out[name] = leaf
            elif leaf is not None and not re.search(r"_extra_state\d*$", name):
                what = leaf.path if isinstance(leaf, Obj) else leaf
                raise FileError(f"{show(name)} is no plain tensor but {show(what)}", file=file,
                                hint="weights kept in FP8 or in tensor subclasses are not read")  # fmt: skip
    except ValueError as error:
        raise FileError(str(error), file=file) from None
    return out


def _topology(file: RankFile) -> Topology:
    """The parallel sizes that the args say, under their newer or older names."""
    sizes = {}
    for short, names in SIZES.items():
        value = next((file.args[n] for n in names if file.args.get(n) is not None), None)
        if value is not None and (type(value) is not int or not 0 < value < 1 << 16):
            raise ConfigError(f"{names[0]} is {show(value)}, not a positive whole number", file=file.path)
        sizes[short] = value
    tp, etp = sizes["tp"] or 1, sizes["etp"] if file.args.get("num_experts") else None
    if etp is not None and tp % etp:
        raise LayoutError(
            f"{file.path}: expert_tensor_parallel_size {etp} does not divide tensor_model_parallel_size {tp}: several "
            "ranks wrote the same file, so that experts are lost",
            hint="save with --ckpt-format torch_dist instead",
        )
    return Topology(tp, sizes["pp"] or 1, sizes["ep"] or 1, len(file.chunks), (), None if etp == tp else etp)


SIZES = {
    "tp": ("tensor_model_parallel_size", "model_parallel_size"),
    "pp": ("pipeline_model_parallel_size",),
    "ep": ("expert_model_parallel_size",),
    "etp": ("expert_tensor_parallel_size",),
}


def _one_save(ranks: Mapping[Rank, RankFile]) -> None:
    """Raise LayoutError if the files are of several iterations or have different numbers of chunks."""
    first = ranks[Rank()]
    for file in ranks.values():
        if file.root.get("iteration") != first.root.get("iteration") or len(file.chunks) != len(first.chunks):
            raise LayoutError(
                f"{file.path} is of iteration {show(file.root.get('iteration'))}, {first.path} of "
                f"{show(first.root.get('iteration'))}",
                hint="the ranks' files are from different saves",
            )


def _count(names: Mapping[str, Lazy]) -> int:
    """How many layers a chunk holds: they are numbered from 0."""
    numbers = {int(m[1]) for name in names if (m := re.match(r"(?:\w+\.)*?layers\.(\d{1,6})\.", name))}
    return len(numbers)


def _rows(tensors: Mapping[str, Lazy], name: str, where: Path) -> int:
    if name not in tensors or len(tensors[name].shape) != 2:
        raise LayoutError(f"{where}: the first rank holds no matrix {name}", hint="is it a GPT model?")
    return tensors[name].shape[0]


def check_heads(spec: Spec, tp: int) -> None:
    """Raise LayoutError for key/value heads that Megatron would have to copy."""
    if spec.g % tp:
        raise LayoutError(f"cannot divide {spec.g} key/value heads among {tp} ranks, and Megatron copies none",
                          hint="choose another --tp")  # fmt: skip


def _dialect(
    first: RankFile, ranks: Mapping[Rank, RankFile], spec: Spec, precore: bool
) -> tuple[Dialect, dict[str, object]]:
    """The table for what is stored, by evidence of the names."""
    version = first.root.get("checkpoint_version", 0)
    if type(version) not in (int, float) or not 0 <= version < 4:
        raise ConfigError(f"checkpoint_version is {show(version)}", file=first.path, hint="known: 0 to 3.0")
    if precore:
        order = 2 if version >= 2 else int(version)
        if order < 2 and spec.n > 1:
            raise LayoutError(f"{first.path}: checkpoint_version {version} knows no grouped queries")
        return precore_table(order), {"layer names": "pre-core classes", "checkpoint_version": version}
    names = {name for file in ranks.values() for chunk in file.chunks for name in chunk}
    norms = "te" if any(".linear_qkv.layer_norm_" in name for name in names) else "local"
    experts = spelling(names)
    details = {"layer names": norms} | ({"experts": experts} if spec.e else {})
    return table(norms, experts), {**details, "checkpoint_version": version}


def spelling(names: set[str]) -> str:
    """How the experts are stored."""
    if any(name.endswith(".mlp.experts.weight1") for name in names):
        return "grouped"
    return "te_grouped" if any(".mlp.experts.linear_fc1." in name for name in names) else "sequential"


def _states(file: RankFile) -> dict[str, str]:
    """Everything in a rank's file and folder that is not the model."""
    out = {}
    for key in file.root:
        if key in ("args", "checkpoint_version", "iteration", "surgery") or re.fullmatch(r"model\d*", str(key)):
            continue
        out[str(key)] = STATES.get(key, "no part of the model")
    for path in file.path.parent.iterdir():
        if path.name != file.path.name:
            out[path.name] = STATES["optimizer"] if "optim" in path.name else "no file that Megatron writes there"
    return out


def run_details(root: Mapping[Any, Any], args: Mapping[str, Any]) -> dict[str, object]:
    """What people want to know of the run."""
    found = {"iteration": root.get("iteration"), "consumed_train_samples": args.get("consumed_train_samples"),
             "consumed_valid_samples": args.get("consumed_valid_samples")}  # fmt: skip
    return {k: v for k, v in found.items() if type(v) is int}


def own_factor(root: Mapping[Any, Any]) -> float | None:
    """The rope's factor where surgery wrote the file: Megatron's own args leave a doubt."""
    mark = root.get("surgery")
    factor = mark.get("rope_factor") if isinstance(mark, dict) else None
    return float(factor) if isinstance(factor, (int, float)) and 0 < factor < 1e6 else None


# ------------------------------------------------------------------------------------------------------- writing


def plan(checkpoint: Checkpoint, topology: Topology, options: Options) -> Output:
    """The ranks' files and the tracker for a checkpoint of any format that Megatron's GPT model can be."""
    spec, carried = checkpoint.spec, checkpoint.details
    norms = chosen(options, "spec", carried.get("layer names"))
    experts = chosen(options, "experts", carried.get("experts"))
    check_heads(spec, topology.tp)
    dialect = table(norms, experts, whole_number(options, "vocab_multiple"))
    ranks = spread(dialect, checkpoint.parts, spec, topology)
    iteration = folders.chosen_iteration(options, carried.get("iteration", carried.get("step")))
    root = root_entries(checkpoint, topology, dialect, {"transformer_impl": _IMPL[norms], **_EXPERT_ARGS[experts],
                                                        "ckpt_format": "torch"}, iteration)  # fmt: skip
    where, text = folders.iteration_name(iteration)
    files = []
    for rank in ranks:
        if rank.chunk == 0:
            chunks = [ranks[rank._replace(chunk=v)] for v in range(topology.vpp)]
            files.append(_rank_file(f"{where}/{folders.rank_folder(rank, topology)}", root, chunks, norms))
    return Output((text_file(folders.TRACKER, text.encode()), *files), tuple(notes_of(checkpoint, topology, dialect)))


_IMPL = {"local": "local", "te": "transformer_engine"}
_EXPERT_ARGS = {
    "sequential": {"moe_grouped_gemm": False, "moe_use_legacy_grouped_gemm": False},
    "grouped": {"moe_grouped_gemm": True, "moe_use_legacy_grouped_gemm": True},
    "te_grouped": {"moe_grouped_gemm": True, "moe_use_legacy_grouped_gemm": False},
}
DEFAULTS = {"spec": "te", "experts": "sequential"}


def chosen(options: Options, name: str, carried: object) -> str:
    """An option; auto: as the source was if that is a choice, else what upstream's current release loads."""
    choice = options.get(name, "auto")
    known = _IMPL if name == "spec" else _EXPERT_ARGS
    return choice if choice != "auto" else str(carried) if carried in known else DEFAULTS[name]


def whole_number(options: Options, name: str) -> int:
    text = options[name]
    if not (text.isdigit() and 0 < int(text) < 1 << 20):
        raise UsageError(f"-O {name}={show(text)} is no positive whole number")
    return int(text)


def root_entries(
    checkpoint: Checkpoint, topology: Topology, dialect: Dialect, more: Mapping[str, Any], iteration: int | None
) -> dict[str, Any]:
    """The entries of a checkpoint besides its tensors: args of primitives only, so that stock loaders take them."""
    spec = checkpoint.spec
    args = write_args(spec) | {
        "tensor_model_parallel_size": topology.tp, "pipeline_model_parallel_size": topology.pp,
        "expert_model_parallel_size": topology.ep, "expert_tensor_parallel_size": topology.expert_tp,
        "virtual_pipeline_model_parallel_size": topology.vpp if topology.vpp > 1 else None,
        "num_layers_per_virtual_pipeline_stage": spec.l // (topology.pp * topology.vpp) if topology.vpp > 1 else None,
        "make_vocab_size_divisible_by": dialect.vocab_multiple, "padded_vocab_size": padded(spec.v, topology, dialect),
        "vocab_size": spec.v_true or spec.v, "bf16": checkpoint.kind == "bfloat16",
        "fp16": checkpoint.kind == "float16", "iteration": iteration or 0, "tokenizer_type": None,
        "consumed_train_samples": checkpoint.details.get("consumed_train_samples", 0),
        "consumed_valid_samples": checkpoint.details.get("consumed_valid_samples", 0), **more,
    }  # fmt: skip
    root: dict[str, Any] = {"args": Record("argparse", "Namespace", (), args), "checkpoint_version": 3.0,
                            "iteration": iteration or 0}  # fmt: skip
    if args.get("rope_scaling_factor", BUILT_IN_FACTOR) != BUILT_IN_FACTOR:
        root["surgery"] = {"rope_factor": args["rope_scaling_factor"]}
    return root


def padded(rows: int, topology: Topology, dialect: Dialect) -> int:
    multiple = dialect.vocab_multiple * topology.tp
    return -(-rows // multiple) * multiple


def notes_of(checkpoint: Checkpoint, topology: Topology, dialect: Dialect) -> list[str]:
    """What has to be said about every Megatron checkpoint that is written."""
    spec, notes = checkpoint.spec, []
    rows = padded(spec.v, topology, dialect)
    if rows != spec.v:
        notes.append(f"the vocabulary of {spec.v} rows is padded with zeros to {rows}, a multiple of "
                     f"{dialect.vocab_multiple} x tp (-O vocab_multiple=N)")  # fmt: skip
    if checkpoint.tokenizer is not None:
        notes.append("Megatron keeps no tokenizer in its checkpoints: give the source's to --tokenizer-model")
    if spec.rope and spec.rope.scaling.get("type") == "llama3" and spec.rope.scaling["factor"] != BUILT_IN_FACTOR:
        notes.append(f"the rope's factor is {spec.rope.scaling['factor']}; pretrain_gpt.py computes with "
                     f"{BUILT_IN_FACTOR:g} whatever rope_scaling_factor says, up to core 0.20 at least")  # fmt: skip
    if any(spec.windows):
        notes.append("window_size needs core 0.13 or newer: older releases attend to everything")
    return notes


def _rank_file(folder: str, root: Mapping[str, Any], chunks: list[dict[str, Stored]], norms: str) -> OutputFile:
    tree, copies = dict(root), set()
    for i, chunk in enumerate(chunks):
        key = "model" if len(chunks) == 1 else f"model{i}"
        tree[key] = {name: s.tensor for name, s in chunk.items()} | dict.fromkeys(extra_states(chunk, norms))
        copies |= {f"{key}.{name}" for name, s in chunk.items() if s.copy}
    return torch_file(f"{folder}/{folders.MODEL_FILES[0]}", tree, frozenset(copies))


def extra_states(names: Mapping[str, Stored], norms: str) -> list[str]:
    """Entries that hold nothing but that loaders miss: one per linear module, and per attention of a TE model."""
    out = {f"{m[1]}._extra_state" for name in names if (m := _LINEAR.match(name))}
    if norms == "te":
        out |= {name.replace("linear_proj", "core_attention") for name in out if "linear_proj" in name}
    if "decoder.final_layernorm.weight" in names:
        out.add("output_layer._extra_state")  # of a tied model too, which has no weight there
    return sorted(out)


OPTIONS = (
    Option("spec", "names of norms and attention: te (Transformer Engine) or local; auto: as the source, else te",
           "auto", ("auto", "local", "te"), "write"),
    Option("experts", "sequential, grouped (GroupedMLP, core < 0.15) or te_grouped; auto: as the source, else "
           "sequential", "auto", ("auto", "sequential", "grouped", "te_grouped"), "write"),
    Option("vocab_multiple", "the vocabulary is padded to a multiple of this times tp", "128", (), "write"),
    Option("iteration", "the iteration to write, or release; auto: the source's own, else 1", "auto", (), "write"),
    Option("rope_factor", "factor of the scaled rope, where args.rope_scaling_factor is not 8", "auto", (), "read"),
)  # fmt: skip

FORMAT = Format(
    name="megatron",
    title="Megatron-LM, legacy `torch` format (mp_rank_*/model_optim_rng.pt)",
    flags=("tp", "pp", "vpp", "ep"),
    options=OPTIONS,
    recognise=recognise,
    open=open_megatron,
    plan=plan,
)
