"""Megatron-LM's legacy checkpoints: `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`, one file per model-parallel rank.

The sizes are decided by the `args` in the files, never by the folders' names alone (`mp_rank_00_001` may be a
pipeline or an expert rank); how many layers a stage holds is counted.  Layouts: `megatron_rows`; the model's own
measures: `megatron_args`.  Optimizer, scheduler and random states are named and left out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.containers import open_file
from surgery.containers.output import OutputFile, text_file
from surgery.containers.pickles.records import Obj, flatten
from surgery.containers.torch_writer import torch_file
from surgery.containers.torch_zip import Tree
from surgery.errors import ConfigError, FileError, LayoutError, show
from surgery.formats.base import Checkpoint, Format, Options, Output, number
from surgery.formats.megatron import entries
from surgery.formats.megatron import folder as folders
from surgery.formats.megatron.config import read_args
from surgery.formats.megatron.rows import OLD_NAMES, precore_table, table
from surgery.formats.table import Dialect, Rank, Stored, Topology, gather, spread
from surgery.model.spec import Spec
from surgery.tensors.extent import Extent
from surgery.tensors.lazy import Lazy

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
    factor = number(options, "rope_factor") or entries.own_factor(first.root)
    found = read_args(first.args, str(first.path), vocab, factor)
    topology = replace(topology, stages=folders.stage_counts(counts, found.spec.layers, where))
    dialect, details = _dialect(first, ranks, found.spec, precore)
    entries.check_heads(found.spec, topology.tp)
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
        details={**entries.run_details(first.root, first.args), **details, "optimizer": _optimizer(ranks.values())},
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
    return RankFile(path, root, tuple(file.globals), entries.namespace(root, path), chunks)


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
    """The parallel sizes that the args say."""
    tp, pp, ep, etp = entries.parallel_sizes(file.args, file.path)
    if tp % etp:
        raise LayoutError(
            f"{file.path}: expert_tensor_parallel_size {etp} does not divide tensor_model_parallel_size {tp}: several "
            "ranks wrote the same file, so that experts are lost",
            hint="save with --ckpt-format torch_dist instead",
        )
    return Topology(tp, pp, ep, len(file.chunks), (), None if etp == tp else etp)


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


def _dialect(
    first: RankFile, ranks: Mapping[Rank, RankFile], spec: Spec, precore: bool
) -> tuple[Dialect, dict[str, object]]:
    """The table for what is stored, by evidence of the names."""
    version = first.root.get("checkpoint_version", 0)
    if type(version) not in (int, float) or not 0 <= version < 4:
        raise ConfigError(f"checkpoint_version is {show(version)}", file=first.path, hint="known: 0 to 3.0")
    if precore:
        order = 2 if version >= 2 else int(version)
        if order < 2 and spec.group > 1:
            raise LayoutError(f"{first.path}: checkpoint_version {version} knows no grouped queries")
        return precore_table(order), {"layer names": "pre-core classes", "checkpoint_version": version}
    names = {name for file in ranks.values() for chunk in file.chunks for name in chunk}
    norms = "te" if any(".linear_qkv.layer_norm_" in name for name in names) else "local"
    experts = spelling(names)
    details = {"layer names": norms} | ({"experts": experts} if spec.experts else {})
    return table(norms, experts), {**details, "checkpoint_version": version}


def spelling(names: set[str]) -> str:
    """How the experts are stored."""
    if any(name.endswith(".mlp.experts.weight1") for name in names):
        return "grouped"
    return "te_grouped" if any(".mlp.experts.linear_fc1." in name for name in names) else "sequential"


def _optimizer(files: Collection[RankFile]) -> str:
    """Where the optimizer's state is."""
    beside = [p for file in files for p in file.path.parent.iterdir() if "optim" in p.name and p != file.path]
    if beside:
        return f"{len(beside)} x {show(beside[0].name)[1:-1]}, {sum(p.stat().st_size for p in beside)} bytes"
    return "in the rank files" if any(file.root.get("optimizer") for file in files) else "none"


def _states(file: RankFile) -> dict[str, str]:
    """Everything in a rank's file and folder that is not the model."""
    out = {}
    for key in file.root:
        if key in entries.READ or re.fullmatch(r"model\d*", str(key)):
            continue
        out[str(key)] = entries.STATES.get(key, "no part of the model")
    for path in file.path.parent.iterdir():
        if path.name != file.path.name:
            out[path.name] = (
                entries.STATES["optimizer"] if "optim" in path.name else "no file that Megatron writes there"
            )
    return out


# ------------------------------------------------------------------------------------------------------- writing


def plan(checkpoint: Checkpoint, topology: Topology, options: Options) -> Output:
    """The ranks' files and the tracker for a checkpoint of any format that Megatron's GPT model can be."""
    spec, carried = checkpoint.spec, checkpoint.details
    norms = entries.chosen(options, "spec", carried.get("layer names"))
    experts = entries.chosen(options, "experts", carried.get("experts"))
    entries.check_heads(spec, topology.tp)
    topology = entries.with_experts(spec, topology, options)
    multiple = entries.whole_number(options, "vocab_multiple")
    iteration = folders.chosen_iteration(options, carried.get("iteration", carried.get("step")))
    args = {"transformer_impl": entries.IMPL[norms], **entries.EXPERT_ARGS[experts], "ckpt_format": "torch"}
    root = entries.root_entries(checkpoint, topology, multiple, args, iteration)
    ranks = spread(table(norms, experts, multiple), checkpoint.parts, spec, topology)
    where, text = folders.iteration_name(iteration)
    files = []
    for rank in ranks:
        if rank.chunk == 0:
            chunks = [ranks[rank._replace(chunk=v)] for v in range(topology.vpp)]
            files.append(_rank_file(f"{where}/{folders.rank_folder(rank, topology)}", root, chunks, norms))
    return Output(
        (text_file(folders.TRACKER, text.encode()), *files), tuple(entries.notes_of(checkpoint, topology, multiple))
    )


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


FORMAT = Format(
    name="megatron",
    title="Megatron-LM, legacy `torch` format (mp_rank_*/model_optim_rng.pt)",
    flags=("tp", "pp", "vpp", "ep"),
    options=entries.OPTIONS,
    recognise=recognise,
    open=open_megatron,
    plan=plan,
)
