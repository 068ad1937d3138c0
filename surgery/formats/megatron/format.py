"""Megatron-LM's legacy checkpoints: `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`, one file per model-parallel rank.

table.py     the tensors          config.py   args <-> Spec (inert.py: arguments without effect)
files.py     folders and files    entries.py  what is said besides the tensors      dist.py   the format torch_dist

The sizes are decided by the `args` in the files, never by the folders' names alone (`mp_rank_00_001` may be a
pipeline or an expert rank); how many layers a stage holds is counted.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from surgery.containers.output import OutputFile, text_file
from surgery.containers.torch_writer import torch_file
from surgery.containers.torch_zip import Tree
from surgery.errors import ConfigError, LayoutError, show
from surgery.formats.base import Checkpoint, Draft, Format, Opened, Options, Place, Ranks, Reading
from surgery.formats.megatron import entries, files, optimizer, optimizer_writer
from surgery.formats.megatron.files import RankFile
from surgery.formats.megatron.order import place as place_of
from surgery.formats.megatron.table import PRECORE, precore_table, table
from surgery.formats.optimizer import States, Written
from surgery.formats.table import Table
from surgery.formats.topology import Rank, Topology
from surgery.formats.weave import Parts, Stored
from surgery.tensors.files import size_of
from surgery.tensors.lazy import Lazy

# modules that carry an _extra_state in every version; Transformer Engine's attention does so too
_LINEAR = re.compile(r"^(.*\.(?:linear_qkv|linear_proj|linear_fc1|linear_fc2)|output_layer)\.weight\d*$")


def locate(folder: Path) -> Place | None:
    return files.place(folder, files.is_legacy)


def read(place: Place, options: Options) -> Opened:
    """A run's latest iteration, or one iteration."""
    where = files.iteration_folder(place.root)
    first = files.open_rank(files.model_file(min(p for p in where.glob("mp_rank_*") if p.is_dir())))
    args = entries.namespace(first.root, first.path)
    topology = _topology(first, args)
    ranks = {rank: files.open_rank(path) for rank, path in files.rank_files(where, topology).items()}
    files.check_one_save(ranks)
    counts = [_count(ranks[Rank(pp=pp)].chunks[v]) for v in range(topology.vpp) for pp in range(topology.pp)]
    rows = ranks[Rank()].chunks[0]
    precore = any(name.startswith("language_model.") for name in rows)
    vocab = _rows(rows, "language_model." * precore + "embedding.word_embeddings.weight", where) * topology.tp
    found, details = _stored(first, ranks, precore)
    tracker = place.root / files.TRACKER
    return Opened(
        args,
        str(first.path),
        {rank._replace(chunk=v): file.chunks[v] for rank, file in ranks.items() for v in range(topology.vpp)},
        tuple(file.tree for file in ranks.values()),
        (tracker,) if tracker.is_file() else (),
        entries.Seen(vocab, entries.own_factor(first.root), sum(counts), found),
        replace(topology, stages=() if len(set(counts)) == 1 else tuple(counts)),  # uneven pipelines
        {**entries.run_details(first.root, args), **details, "optimizer": _optimizer(ranks.values())},
    )


def _topology(file: RankFile, args: Mapping[str, Any]) -> Topology:
    """The parallel sizes that the args say."""
    tp, pp, ep, etp = entries.parallel_sizes(args, file.path)
    if tp % etp:
        raise LayoutError(
            f"{file.path}: expert_tensor_parallel_size {etp} does not divide tensor_model_parallel_size {tp}: several "
            "ranks wrote the same file, so that experts are lost",
            hint="save with --ckpt-format torch_dist instead",
        )
    return Topology(tp, pp, ep, len(file.chunks), (), None if etp == tp else etp)


def _count(names: Mapping[str, Lazy]) -> int:
    """How many layers a chunk holds: they are numbered from 0."""
    numbers = {int(m[1]) for name in names if (m := re.match(r"(?:\w+\.)*?layers\.(\d{1,6})\.", name))}
    return len(numbers)


def _rows(tensors: Mapping[str, Lazy], name: str, where: Path) -> int:
    if name not in tensors or len(tensors[name].shape) != 2:
        raise LayoutError(f"{where}: the first rank holds no matrix {name}", hint="is it a GPT model?")
    return tensors[name].shape[0]


def _stored(first: RankFile, ranks: Mapping[Rank, RankFile], precore: bool) -> tuple[Table, dict[str, object]]:
    """The table for what is stored, by evidence of the names."""
    version = first.root.get("checkpoint_version", 0)
    if type(version) not in (int, float) or not 0 <= version < 4:
        raise ConfigError(f"checkpoint_version is {show(version)}", file=first.path, hint="known: 0 to 3.0")
    if precore:
        details = {"layer names": "pre-core classes", "checkpoint_version": version}
        return precore_table(2 if version >= 2 else int(version)), details
    names = {name for file in ranks.values() for chunk in file.chunks for name in chunk}
    norms = "te" if any(".linear_qkv.layer_norm_" in name for name in names) else "local"
    experts = spelling(names)
    details = {"layer names": norms} | ({"experts": experts} if any(".experts." in name for name in names) else {})
    return table(norms, experts), {**details, "checkpoint_version": version}


def spelling(names: set[str]) -> str:
    """How the experts are stored."""
    if any(name.endswith(".mlp.experts.weight1") for name in names):
        return "grouped"
    return "te_grouped" if any(".mlp.experts.linear_fc1." in name for name in names) else "sequential"


def _optimizer(ranks: Collection[RankFile]) -> str:
    """Where the optimizer's state is."""
    beside = [p for file in ranks for p in file.path.parent.iterdir() if "optim" in p.name and p != file.path]
    if beside:
        return f"{len(beside)} x {show(beside[0].name)[1:-1]}, {sum(size_of(p) for p in beside)} bytes"
    return "in the rank files" if any(file.root.get("optimizer") for file in ranks) else "none"


def states(place: Place, opened: Opened, reading: Reading, parts: Parts, options: Options) -> States | None:
    ranks = [rank for rank in opened.shards if rank.chunk == 0]
    trees = [c for c in opened.containers if isinstance(c, Tree)]
    chunks = range(opened.topology.vpp)
    held = {rank: RankFile(tree.paths[0], tree, tuple(dict(opened.shards[rank._replace(chunk=v)]) for v in chunks))
            for rank, tree in zip(ranks, trees, strict=True)}  # fmt: skip
    return optimizer.read_states(held, opened.config, opened.topology)


def stored_table(opened: Opened, reading: Reading, options: Options) -> Table:
    """The table for what is stored.  Raises LayoutError where the args contradict the files."""
    spec, seen = reading.spec, opened.seen
    if seen.layers != spec.layers:
        raise LayoutError(f"the pipeline stages hold {seen.layers} layers, but args say num_layers {spec.layers}",
                          file=opened.file, hint="stages are missing, or of several saves")  # fmt: skip
    if seen.table.name == PRECORE and spec.group > 1 and opened.details["checkpoint_version"] in (0, 1):
        raise LayoutError("its checkpoint_version knows no grouped queries", file=opened.file)
    entries.check_heads(spec, opened.topology.tp)
    table: Table = seen.table
    return table


# ------------------------------------------------------------------------------------------------------- writing


def draft(checkpoint: Checkpoint, topology: Topology, options: Options) -> Draft:
    """The ranks' files and the tracker."""
    distributed = options.get("optimizer") == "distributed"
    more = {"ckpt_format": "torch"} | ({"use_distributed_optimizer": True} if distributed else {})
    plan = entries.written(checkpoint, topology, options, more)
    rows = table(plan.norms, plan.experts, plan.multiple)
    planned = partial(_files, plan)
    return Draft(plan.args, plan.seen, rows, plan.topology, planned, plan.notes, states=planned)


def _files(plan: entries.Written, ranks: Ranks, written: Written | None = None) -> Iterable[OutputFile]:
    where, text = files.iteration_name(plan.iteration)
    yield text_file(files.TRACKER, text.encode())
    for rank in ranks:
        if rank.chunk == 0:
            own = [rank._replace(chunk=v) for v in range(plan.topology.vpp)]
            yield from _rank_files(f"{where}/{files.rank_folder(rank, plan.topology)}", plan, ranks, own, written)


def _rank_files(
    folder: str, plan: entries.Written, ranks: Ranks, own: Sequence[Rank], written: Written | None
) -> Iterator[OutputFile]:
    """A rank's files, its parameters in the order in which Megatron numbers them."""
    tree, copies = dict(plan.root), set[str]()
    chunks = {rank: dict(sorted(ranks[rank].items(), key=lambda item: place_of(item[0]))) for rank in own}
    if written:
        state = optimizer_writer.entry(written, chunks, plan.topology, plan.args, plan.wanted)
        tree |= {"optimizer": state.tree, "opt_param_scheduler": entries.scheduler(written, plan)}
        copies |= state.replicas
        if state.beside is not None:
            yield torch_file(f"{folder}/{optimizer.FLAT}", state.beside)
    for i, chunk in enumerate(chunks.values()):
        key = "model" if len(chunks) == 1 else f"model{i}"
        tree[key] = {name: s.tensor for name, s in chunk.items()} | dict.fromkeys(extra_states(chunk, plan.norms))
        copies |= {f"{key}.{name}" for name, s in chunk.items() if s.copy}
    yield torch_file(f"{folder}/{files.MODEL_FILES[0]}", tree, frozenset(copies))


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
    who="Megatron",
    title="Megatron-LM, legacy `torch` format (mp_rank_*/model_optim_rng.pt)",
    locate=locate,
    read=read,
    spec=entries.spec,
    table=stored_table,
    draft=draft,
    flags=("tp", "pp", "vpp", "ep"),
    options=(*entries.OPTIONS, *entries.LEGACY_OPTIONS),
    entries=entries.ENTRIES,
    states=states,
    masters=True,
)
