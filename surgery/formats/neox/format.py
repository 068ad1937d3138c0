"""GPT-NeoX: DeepSpeed's `layer_NN-model_TT` or `mp_rank_TT` files, and the YAML files of the run.

    neox_rows.py    the tensors             neox_config.py   YAML -> Spec       neox_releases.py   names and packing
    neox_files.py   the files, opened       neox_yaml.py     Spec -> YAML       neox_keys.py       keys without effect

`--pp 0` is GPT-NeoX's "sequential" model, whose weights are in the rank files; from `--pp 1` on every layer has files
of its own, whatever the number of stages.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from surgery import tokenizer
from surgery.containers.output import OutputFile, text_file
from surgery.containers.torch_writer import torch_file
from surgery.errors import LayoutError, show
from surgery.formats.base import Checkpoint, Format, Option, Options, Output
from surgery.formats.neox import config as neox_config
from surgery.formats.neox import files as neox_files
from surgery.formats.neox import write_config as neox_yaml
from surgery.formats.neox.config import Reading
from surgery.formats.neox.inert import INERT
from surgery.formats.neox.releases import NEWEST, RELEASES, Release
from surgery.formats.neox.rows import Spelling, table
from surgery.formats.table import Rank, Stored, Topology, gather, spread
from surgery.model.spec import Rope, Spec
from surgery.tensors.lazy import Fill, Lazy, Map, Same

if TYPE_CHECKING:
    import torch

UNEQUAL = (
    "runs of some releases let the norms of ranks drift apart; -O replicas=average takes their mean, as upstream does"
)
_LEFT_OUT = {
    "optimizer": "the optimizer's state", "lr_scheduler": "the learning rate scheduler's state",
    "random_rng_state": "state of random numbers", "np_rng_state": "state of random numbers",
    "torch_rng_state": "state of random numbers", "cuda_rng_state": "state of random numbers",
    "rng_tracker_states": "state of random numbers", "checkpoint_validation_logits": "logits for GPT-NeoX's own check",
}  # fmt: skip


def open_neox(folder: Path, options: Options) -> Checkpoint:
    """A run's latest iteration, or one iteration.  Raises SurgeryError naming all that does not fit."""
    found = neox_files.locate(folder, options.get("config", ""))
    config = neox_files.read_configs(found)
    place = str(found.configs[0].parent)
    opened = neox_files.open_files(found)
    seen = neox_files.evidence(opened, found.folder)
    neox_files.check_arguments(opened.state, config, seen.vocab, place)
    reading = neox_config.read_config(
        config, place, seen, qkv=options.get("qkv", "auto"), release=options.get("release", "auto")
    )
    spec = reading.spec
    _divide(spec, opened.tp)
    cut = neox_files.head_cut(opened, seen.vocab)
    how = Spelling(seen.mlp, reading.qkv, opened.tp, opened.prefix, cut, options.get("replicas") == "average")
    gathered = gather(table(spec, how), opened.shards, spec, Topology(tp=opened.tp))
    checkpoint = Checkpoint(
        format="neox",
        path=folder,
        spec=spec,
        parts={n: Same(p.srcs, p.name, UNEQUAL) if isinstance(p, Same) else p for n, p in gathered.parts.items()},
        topology=Topology(tp=opened.tp, pp=opened.pp),
        config=config,
        files=tuple(p for p in found.files if folder in p.parents),
        globals=opened.globals,
        ignored={**gathered.ignored, **_left_out(found, opened)},
        details=_details(found, opened, reading),
        tokenizer=tokenizer.find(folder, found.folder, found.folder.parent),
    )
    return replace(checkpoint, notes=(*reading.notes, *_rounding(checkpoint, how), *_masters(checkpoint, found)))


def _divide(spec: Spec, tp: int) -> None:
    """Raise LayoutError unless every rank has whole key/value heads, as GPT-NeoX demands."""
    if spec.kv_heads % tp or spec.ffn % tp:
        what = f"{spec.kv_heads} key/value heads" if spec.kv_heads % tp else f"an ffn width of {spec.ffn}"
        raise LayoutError(f"cannot divide {what} among {tp} ranks", hint="choose another --tp")


def _left_out(found: neox_files.Found, opened: neox_files.Opened) -> dict[str, str]:
    """What the files hold besides weights."""
    out = {p.name: "the optimizer's state" for p in found.optimizer}
    if found.ranks:
        out |= {f"{found.ranks[0].name}:{k}": why for k, why in _LEFT_OUT.items() if opened.state.get(k)}
    return out


def _details(found: neox_files.Found, opened: neox_files.Opened, reading: Reading) -> dict[str, object]:
    """What people want to know: iteration, versions, layout, optimizer."""
    state = opened.state
    named = {k: state.get(k) for k in ("iteration", "global_steps", "global_samples", "skipped_steps", "dp_world_size",
                                       "ds_version")}  # fmt: skip
    folder = re.fullmatch(r"(?:global_step)?(\d{1,12})", found.folder.name)
    if type(named["iteration"]) is not int and folder:
        named["iteration"] = int(folder[1])
    size = sum(p.stat().st_size for p in found.optimizer)
    out: dict[str, object] = {k: v if type(v) is int else show(v)[1:-1] for k, v in named.items()
                              if type(v) in (int, str)}  # fmt: skip
    out["layout"] = "a file per layer" if found.layers else "a file per rank (sequential)"
    out["release"] = reading.release
    out["query_key_value"] = f"layout {reading.qkv}"
    out["optimizer"] = "in the rank files" if state.get("optimizer") else "none"
    if found.optimizer:
        out["optimizer"] = f"{len(found.optimizer)} ZeRO files, {size} bytes"
    out["configs"] = ", ".join(p.name for p in found.configs)
    return out


def _rounding(checkpoint: Checkpoint, how: Spelling) -> Iterator[str]:
    spec = checkpoint.spec
    if spec.parallel and how.tp > 1 and (spec.o_bias or spec.mlp_bias):
        yield (f"row-parallel biases are the sum of {how.tp} ranks' biases (parallel residual), computed in fp32 and "
               f"rounded once to {checkpoint.dtype}")  # fmt: skip
    if how.averaged and how.tp > 1:
        yield "copies that differ between the ranks are averaged (-O replicas=average): not exact"


def _masters(checkpoint: Checkpoint, found: neox_files.Found) -> Iterator[str]:
    if found.optimizer and checkpoint.dtype != "float32":
        yield (f"the optimizer's files hold fp32 copies of the weights, which are not converted; the weights are those "
               f"in {checkpoint.dtype} that the run computed with")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- writing


def plan(checkpoint: Checkpoint, topology: Topology, options: Options) -> Output:
    """`latest`, the files of one iteration with its configs, and the tokenizer."""
    name = options.get("release", "auto")
    release = RELEASES[NEWEST if name == "auto" else name]
    spec, tp, pp = checkpoint.spec, topology.tp, topology.pp
    found = checkpoint.tokenizer
    multiple = neox_yaml.vocab_multiple(spec.vocab, tp, spec.true_vocab or (found.vocab_size if found else None))
    config = neox_yaml.write_config(spec, release, tp=tp, pp=pp, multiple=multiple, kind=checkpoint.dtype)
    _divide(spec, tp)
    rows = spec.vocab if spec.vocab % tp == 0 else -(-spec.vocab // (multiple * tp)) * multiple * tp
    prefix = "" if pp else "sequential."
    mlp, layout = neox_yaml.spelling_of_mlp(spec, release), release.gqa if spec.group > 1 else "A"
    how = Spelling(mlp, layout, tp, prefix, vocab_multiple=multiple if rows != spec.vocab else 1)
    dialect = table(spec, how)
    ranks = spread(dialect, checkpoint.parts, spec, Topology(tp=tp))
    if release.buffer and spec.rope is not None:
        ranks = {
            rank: _with_buffers(stored, spec, spec.rope, checkpoint.dtype, prefix) for rank, stored in ranks.items()
        }
    step = _step(checkpoint)
    tag = f"global_step{step}"
    state = _state(config, rows, step, max(pp, 1) * tp, release)
    files = list(_layer_files(tag, ranks, spec) if pp else ())
    files += _rank_files(tag, ranks, state, tp, pp)
    tokens, named = _tokenizer(checkpoint)
    configs = {"model.yml": {**config, **named}, "training.yml": _training(checkpoint, release)}
    files += [text_file(f"{tag}/configs/{k}", neox_yaml.to_yaml(v)) for k, v in configs.items()]
    files += [text_file("latest", tag.encode()), *tokens.files]
    return Output(tuple(files), (*_remarks(spec, release, name), *tokens.notes))


def _step(checkpoint: Checkpoint) -> int:
    step = checkpoint.details.get("iteration")
    return step if type(step) is int and 0 <= step < 10**12 else 0


def _with_buffers(stored: Mapping[str, Stored], spec: Spec, rope: Rope, kind: str, prefix: str) -> dict[str, Stored]:
    """The rank's tensors with inv_freq in every layer, without which code before 2024-03 does not load them."""
    turning = int(spec.head_dim * rope.fraction)
    buffer = Map(
        lambda empty: _frequencies(empty, rope.base, turning), (Fill(((turning + 1) // 2,), kind),), whole=True
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
        "optimizer": {}, "lr_scheduler": None, "skipped_steps": 0, "global_steps": step, "iteration": step,
        "dp_world_size": 1, "mp_world_size": world,
        "args": {**{k: config[k] for k in keys}, "padded_vocab_size": rows},
        neox_files.MARK: {"release": release.name},
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


def _tokenizer(checkpoint: Checkpoint) -> tuple[tokenizer.Carried, dict[str, object]]:
    """The tokenizer's files, and the keys that name them."""
    found = checkpoint.tokenizer
    if found is None:
        return tokenizer.Carried((), ("no tokenizer was found, none is written (--tokenizer PATH adds one)",)), {}
    carried = tokenizer.carry(found)
    kind = {"tokenizer.json": "HFTokenizer", "tokenizer.model": "SPMTokenizer"}
    name = next((n for n in kind if n in found.files), None)
    if name is None or found.kind == "tiktoken":
        note = "GPT-NeoX reads no rank file of tiktoken; set tokenizer_type and vocab_file yourself"
        return tokenizer.Carried(carried.files, (*carried.notes, note)), {}
    return carried, {"tokenizer_type": kind[name], "vocab_file": name}


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
    title="GPT-NeoX (DeepSpeed layer or rank files, configs/*.yml)",
    flags=("tp", "pp"),
    options=(
        Option("release", "the code that reads or wrote it (names, packing of grouped queries, buffers); auto: reading "
               f"goes by the files, writing is for {NEWEST}", "auto", ("auto", *RELEASES)),
        Option("qkv", "how query_key_value is packed: A, B by head, C all q then k then v; auto: by the files", "auto",
               ("auto", *("A", "B", "C")), "read"),
        Option("replicas", "copies of norms on several ranks must be equal, or are averaged (not exact)", "equal",
               ("equal", "average"), "read"),
        Option("config", "YAML files to read instead of configs/*.yml, separated by commas", "", (), "read"),
    ),
    recognise=neox_files.recognise,
    open=open_neox,
    plan=plan,
    zero=("pp",),
)  # fmt: skip
