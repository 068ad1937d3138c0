"""GPT-NeoX: DeepSpeed's `layer_NN-model_TT` or `mp_rank_TT` files, and the YAML files of the run.

    table.py    the tensors             config.py         YAML -> Spec       releases.py   names and packing
    files.py    the files, opened       write_config.py   Spec -> YAML       inert.py      keys without effect

`--pp 0` is GPT-NeoX's "sequential" model, whose weights are in the rank files; from `--pp 1` on every layer has files
of its own, whatever the number of stages.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from surgery import tokenizer
from surgery.containers.output import OutputFile, text_file
from surgery.containers.torch_writer import torch_file
from surgery.errors import ConfigError, LayoutError, NoStateError, show
from surgery.formats.account import OPTIMIZER, RANDOM, READ, SCHEDULER, Rule
from surgery.formats.base import (
    Checkpoint,
    Config,
    Draft,
    Format,
    Opened,
    Option,
    Options,
    Place,
    Ranks,
    Reading,
    main_dtype,
)
from surgery.formats.neox import files, optimizer, write_config
from surgery.formats.neox.config import read_config
from surgery.formats.neox.inert import INERT
from surgery.formats.neox.releases import NEWEST, RELEASES, Evidence, Release
from surgery.formats.neox.table import Spelling, table
from surgery.formats.neox.universal import notes_of, read_universal, universal_files
from surgery.formats.optimizer import ALONE, States, Written
from surgery.formats.padding import multiple_of
from surgery.formats.table import Table
from surgery.formats.topology import Rank, Topology
from surgery.formats.weave import Parts, Stored, spread
from surgery.model.spec import Rope, Spec
from surgery.tensors.files import size_of
from surgery.tensors.lazy import Fill, Lazy, Map
from surgery.tokenizer import Carried, Tokenizer
from surgery.units import divisors

if TYPE_CHECKING:
    import torch

UNEQUAL = (
    "runs of some releases let the norms of ranks drift apart; -O replicas=average takes their mean, as upstream does"
)
ENTRIES = (
    Rule(r"args|surgery|iteration|(?:global|skipped)_\w+|(?:dp|mp)_world_size|ds_version", verdict=READ),
    Rule(r"(optimizer)(?:\..*)?", OPTIMIZER),
    Rule(r"(lr_scheduler)(?:\..*)?", SCHEDULER),
    Rule(r"((?:random|np|torch|cuda)_rng_state|rng_tracker_states)(?:\..*)?", RANDOM),
    Rule(r"(checkpoint_validation_logits)", "logits for GPT-NeoX's own check"),
    Rule(r"(buffer_names|(?:frozen_)?param\w*|shared_params|\w+_tensor_module_names|data_sampler|random_ltd|ds_config|"
         r"num_experts|checkpoint_parallel_dimensions)(?:\..*)?", "DeepSpeed's own records"),
)  # fmt: skip


def read(place: Place, options: Options) -> Opened:
    """A run's latest iteration, or one iteration."""
    found = files.find(place.root, options.get("config", ""))
    config = files.read_configs(found)
    stored = files.open_files(found)
    seen = files.evidence(stored, found.folder)
    file, latest = str(found.configs[0].parent), place.root / "latest"
    files.check_arguments(stored.state, config, seen.vocab, file)
    notes = _masters(found, main_dtype(t for shard in stored.shards.values() for t in shard.values()))
    return Opened(
        config,
        file,
        stored.shards,
        stored.trees,
        (*found.configs, *([latest] if latest.is_file() else [])),
        seen,
        Topology(tp=stored.tp),
        _details(found, stored),
        Topology(tp=stored.tp, pp=stored.pp),
        tuple(notes),
    )


def spec(config: Config, file: str, seen: Evidence, options: Options) -> Reading:
    found = read_config(config, file, seen, qkv=options.get("qkv", "auto"), release=options.get("release", "auto"))
    details = {"release": found.release, "query_key_value": f"layout {found.qkv}"}
    notes = (*found.notes, *_rounding(found.spec, seen, options))
    padding = multiple_of(seen.vocab, config.get("make_vocab_size_divisible_by", 128), seen.ranks)
    return Reading(found.spec, notes, details=details, variant=found.qkv, padding=padding)


def states(place: Place, opened: Opened, reading: Reading, parts: Parts, options: Options) -> States | None:
    found = files.find(place.root, options.get("config", ""))
    if not found.optimizer and opened.details["optimizer"] == "in the rank files":
        raise NoStateError("keeps its optimizer in the rank files (ZeRO stage 0), which is not read", file=found.folder,
                           hint=ALONE)  # fmt: skip
    return read_universal(found.folder, opened.shards) or optimizer.read_states(
        found, opened.shards, opened.topology.tp
    )


def stored_table(opened: Opened, reading: Reading, options: Options) -> Table:
    seen = opened.seen
    _divide(reading.spec, seen.ranks)
    averaged = options.get("replicas") == "average"
    how = Spelling(seen.mlp, reading.variant, seen.ranks, seen.prefix, seen.head_cut, averaged)
    return replace(table(reading.spec, how), unequal=UNEQUAL)


def _divide(spec: Spec, tp: int) -> None:
    """Raise LayoutError unless every rank has whole key/value heads, as GPT-NeoX demands."""
    if spec.kv_heads % tp or spec.ffn % tp:
        what = f"{spec.kv_heads} key/value heads" if spec.kv_heads % tp else f"an ffn width of {spec.ffn}"
        raise LayoutError(f"cannot divide {what} among {tp} ranks", hint=f"--tp {divisors(spec.kv_heads, spec.ffn)}")


def _details(found: files.Found, stored: files.Stored) -> dict[str, object]:
    """What people want to know: iteration, versions, layout, optimizer."""
    state = stored.state
    named = {k: state.get(k) for k in ("iteration", "global_steps", "global_samples", "skipped_steps", "dp_world_size",
                                       "ds_version")}  # fmt: skip
    folder = re.fullmatch(r"(?:global_step)?(\d{1,12})", found.folder.name)
    if type(named["iteration"]) is not int and folder:
        named["iteration"] = int(folder[1])
    size = sum(size_of(p) for p in found.optimizer)
    out: dict[str, object] = {k: v if type(v) is int else show(v)[1:-1] for k, v in named.items()
                              if type(v) in (int, str)}  # fmt: skip
    out["layout"] = "a file per layer" if found.layers else "a file per rank (sequential)"
    out["optimizer"] = "in the rank files" if state.get("optimizer") else "none"
    if found.optimizer:
        out["optimizer"] = f"{len(found.optimizer)} ZeRO files, {size} bytes"
    out["configs"] = ", ".join(p.name for p in found.configs)
    return out


def _rounding(spec: Spec, seen: Evidence, options: Options) -> Iterator[str]:
    if spec.parallel and seen.ranks > 1 and (spec.o_bias or spec.mlp_bias):
        yield (f"row-parallel biases are the sum of {seen.ranks} ranks' biases (parallel residual), computed in fp32 "
               f"and rounded once to {seen.dtype}")  # fmt: skip
    if options.get("replicas") == "average" and seen.ranks > 1:
        yield "copies that differ between the ranks are averaged (-O replicas=average): not exact"


def _masters(found: files.Found, dtype: str) -> Iterator[str]:
    if found.optimizer and dtype != "float32":
        yield (f"the optimizer's files hold fp32 copies of the weights, which only --optimizer converts; the "
               f"weights are those in {dtype} that the run computed with")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- writing


def draft(checkpoint: Checkpoint, topology: Topology, options: Options) -> Draft:
    """`latest` and the files of one iteration with its configs."""
    name = options["release"]
    release = RELEASES[NEWEST if name == "auto" else name]
    spec, tp, pp = checkpoint.spec, topology.tp, topology.pp
    write_config.refuse(spec, release)
    multiple = write_config.vocab_multiple(spec.vocab, tp, spec.true_vocab)
    config = write_config.write_config(spec, release, tp=tp, pp=pp, multiple=multiple, dtype=checkpoint.dtype)
    _divide(spec, tp)
    rows = spec.vocab if spec.vocab % tp == 0 else -(-spec.vocab // (multiple * tp)) * multiple * tp
    seen = replace(write_config.shown(spec, release), prefix="" if pp else "sequential.")
    padding = multiple if rows != spec.vocab else 1
    how = Spelling(seen.mlp, release.gqa if spec.group > 1 else "A", tp, seen.prefix, vocab_multiple=padding)
    planned = partial(_files, checkpoint, config, release, rows, topology)
    whole = table(spec, replace(how, tp=1, vocab_multiple=padding * tp))
    return Draft(
        config,
        seen,
        table(spec, how),
        Topology(tp=tp),
        planned,
        (*_remarks(spec, release, name), *(notes_of(checkpoint.optimizer, whole) if checkpoint.optimizer else [])),
        write_config.program(release),
        write_config.hint(spec, release),
        partial(_with_states, planned, whole, checkpoint, topology, how.qkv),
        (whole, Topology()),
    )


def _with_states(
    weights: Callable[..., Iterable[OutputFile]], whole: Table, checkpoint: Checkpoint, topology: Topology, qkv: str,
    ranks: Ranks, written: Written,
) -> Iterable[OutputFile]:  # fmt: skip
    """Raises ConfigError for models whose parameters have other names or values than those of one rank."""
    spec = checkpoint.spec
    if spec.tied and topology.pp:
        raise ConfigError("an optimizer's state of a tied model is written without a pipeline",
                          hint="--pp 0, or without --optimizer")  # fmt: skip
    if topology.tp > 1 and any(row.summed for row, _ in whole.live(spec, Topology())):
        raise ConfigError("an optimizer's state is written for one tensor-parallel rank where ranks store shares of "
                          "biases (parallel residual)", hint="--tp 1, or without --optimizer")  # fmt: skip
    yield from weights(ranks, _scheduler(written))
    names = spread(whole, checkpoint.parts, spec, Topology())[Rank()]
    yield from universal_files(f"global_step{_step(checkpoint)}", written, names, spec, qkv)


def _scheduler(written: Written) -> dict[str, object]:
    """What GPT-NeoX's loader asks for beside an optimizer: the rate of the last update, for ever."""
    lr = next((group.lr for group in written.groups.values() if group.lr is not None), 0.0)
    return {"start_lr": lr, "min_lr": 0.0, "warmup_iter": 0, "num_iters": written.step,
            "end_iter": max(written.step, 1), "decay_style": "constant"}  # fmt: skip


def _files(
    checkpoint: Checkpoint, config: Config, release: Release, rows: int, topology: Topology, ranks: Ranks,
    scheduler: Mapping[str, object] | None = None,
) -> Iterable[OutputFile]:  # fmt: skip
    spec, tp, pp = checkpoint.spec, topology.tp, topology.pp
    if release.buffer and spec.rope is not None:
        prefix = "" if pp else "sequential."
        ranks = {r: _with_buffers(stored, spec, spec.rope, checkpoint.dtype, prefix) for r, stored in ranks.items()}
    step = _step(checkpoint)
    tag = f"global_step{step}"
    if pp:
        yield from _layer_files(tag, ranks, spec)
    state = {**_state(config, rows, step, max(pp, 1) * tp, release), "lr_scheduler": scheduler}
    yield from _rank_files(tag, ranks, state, tp, pp)
    configs = {"model.yml": {**config, **_named(checkpoint.tokenizer)}, "training.yml": _training(checkpoint, release)}
    for name, values in configs.items():
        yield text_file(f"{tag}/configs/{name}", write_config.to_yaml(values))
    yield text_file("latest", tag.encode())


def _step(checkpoint: Checkpoint) -> int:
    step = checkpoint.details.get("iteration")
    return step if type(step) is int and 0 <= step < 10**12 else 0


def _with_buffers(stored: Mapping[str, Stored], spec: Spec, rope: Rope, dtype: str, prefix: str) -> dict[str, Stored]:
    """The rank's tensors with inv_freq in every layer, without which code before 2024-03 does not load them."""
    turning = int(spec.head_dim * rope.fraction)
    buffer = Map(
        lambda empty: _frequencies(empty, rope.base, turning), (Fill(((turning + 1) // 2,), dtype),), whole=True
    )
    extra = {f"{prefix}{i + 2}.attention.rotary_emb.inv_freq": Stored(buffer) for i in range(spec.layers)}
    return {**stored, **extra}


def _frequencies(empty: torch.Tensor, base: float, turning: int) -> torch.Tensor:
    import torch

    return (1.0 / base ** (torch.arange(0, turning, 2).float() / turning)).to(empty.dtype)


def _state(config: Mapping[str, object], rows: int, step: int, world: int, release: Release) -> dict[str, object]:
    """The entries that DeepSpeed and GPT-NeoX ask for; GPT-NeoX compares `args` with its configuration."""
    keys = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings",
            "make_vocab_size_divisible_by", "model_parallel_size")  # fmt: skip
    return {
        "optimizer": {}, "skipped_steps": 0, "global_steps": step, "iteration": step,
        "dp_world_size": 1, "mp_world_size": world,
        "args": {**{k: config[k] for k in keys}, "padded_vocab_size": rows},
        files.MARK: {"release": release.name},
    }  # fmt: skip


def _layer_files(tag: str, ranks: Mapping[Rank, Mapping[str, Stored]], spec: Spec) -> Iterator[OutputFile]:
    """A file for every module of the pipeline, also for a norm without weights; those of a tied head do not exist."""
    numbers = [0, *range(2, spec.layers + 2), spec.layers + 3, *([] if spec.tied else [spec.layers + 4])]
    for number in numbers:
        for rank, stored in ranks.items():
            mine = {n.removeprefix(f"{number}."): s for n, s in stored.items() if n.startswith(f"{number}.")}
            tensors = OrderedDict((n, s.tensor) for n, s in mine.items())
            copies = frozenset(n for n, s in mine.items() if s.copy)
            yield torch_file(f"{tag}/layer_{number:02d}-model_{rank.tp:02d}-model_states.pt", tensors, copies)


def _rank_files(
    tag: str, ranks: Mapping[Rank, Mapping[str, Stored]], state: Mapping[str, object], tp: int, pp: int
) -> Iterator[OutputFile]:
    """One file per rank of the pipeline and tensor parallelism, with the weights if there is no pipeline."""
    for number in range(max(pp, 1) * tp):
        module: dict[str, Lazy] | None = None
        copies: frozenset[str] = frozenset()
        if not pp:
            stored = dict(sorted(ranks[Rank(tp=number)].items(), key=lambda item: int(item[0].split(".")[1])))
            module = OrderedDict((n, s.tensor) for n, s in stored.items())
            copies = frozenset(f"module.{n}" for n, s in stored.items() if s.copy)
        yield torch_file(f"{tag}/mp_rank_{number:02d}_model_states.pt", {"module": module, **state}, copies)


_TOKENIZERS = {"tokenizer.json": "HFTokenizer", "tokenizer.model": "SPMTokenizer"}


def _named(found: Tokenizer | None) -> dict[str, object]:
    """The keys that name a tokenizer's file."""
    name = next((n for n in _TOKENIZERS if found and n in found.files), None)
    if found is None or name is None or found.kind == "tiktoken":
        return {}
    return {"tokenizer_type": _TOKENIZERS[name], "vocab_file": name}


def tokens(found: Tokenizer, checkpoint: Checkpoint) -> Carried:
    carried, named = tokenizer.carry(found), _named(found)
    note = "GPT-NeoX reads no rank file of tiktoken; set tokenizer_type and vocab_file yourself"
    if named:
        note = (f"GPT-NeoX looks for {named['vocab_file']} where it is started: start it in the output's folder, or "
                "give vocab_file the whole path")  # fmt: skip
    return Carried(carried.files, (*carried.notes, note))


def _training(checkpoint: Checkpoint, release: Release) -> dict[str, object]:
    """Settings of the source's own run, if it was GPT-NeoX's; no optimizer and no random state are there to load."""
    own = {"finetune": True, "no_load_optim": True, "no_load_rng": True}
    if checkpoint.format != "neox":
        return dict(own)
    skip = {"tokenizer_type", "vocab_file", "iteration", "rotary_save_freqs_buffer", *own}
    return {**{k: v for k, v in checkpoint.config.items() if k in INERT - skip}, **own}


def _remarks(spec: Spec, release: Release, name: str) -> Iterator[str]:
    if name == "auto":
        yield f"written for GPT-NeoX {release.when} (-O release=... writes for others)"
    if spec.norm == "rms" and release.name != NEWEST:
        yield (f"GPT-NeoX {release.name} divides by rms + eps, everyone else by sqrt(ms + eps): its logits may differ "
               "by about 1e-4")  # fmt: skip


FORMAT = Format(
    name="neox",
    who="GPT-NeoX",
    title="GPT-NeoX (DeepSpeed layer or rank files, configs/*.yml)",
    locate=files.locate,
    read=read,
    spec=spec,
    table=stored_table,
    draft=draft,
    tokens=tokens,
    flags=("tp", "pp"),
    zero=("pp",),
    entries=ENTRIES,
    states=states,
    masters=True,
    options=(
        Option("release", "the code that reads or wrote it (names, packing of grouped queries, buffers); auto: reading "
               f"goes by the files, writing is for {NEWEST}", "auto", ("auto", *RELEASES)),
        Option("qkv", "how query_key_value is packed: A, B by head, C all q then k then v; auto: by the files", "auto",
               ("auto", *("A", "B", "C")), "read"),
        Option("replicas", "copies of norms on several ranks must be equal, or are averaged (not exact)", "equal",
               ("equal", "average"), "read"),
        Option("config", "YAML files to read instead of configs/*.yml, separated by commas", "", (), "read"),
    ),
)  # fmt: skip
