"""OLMo-core (OLMo 2, OLMo 3, FlexOlmo and whatever its `Transformer` builds): `config.json`, `model_and_optim/`.

Names and layouts: OLMo-core `nn/transformer/model.py`, `nn/attention/__init__.py`, `nn/moe/mlp.py`.  Norms keep their
names when a reordered block moves them behind attention and mlp.  Three things cannot be seen in names or shapes and
come from the config: `complex` rotary embeddings turn neighbours (`half two`), in the norms of q and k too; experts of
the kind `default` lie transposed; fused attention packs q, k and v.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from surgery import tokenizer
from surgery.containers import open_tensors
from surgery.containers.dcp_writer import dcp_files
from surgery.containers.output import text_file
from surgery.containers.text import read_json
from surgery.errors import ConfigError, FileError
from surgery.formats.base import Checkpoint, Format, Option, Options, Output, number
from surgery.formats.olmo.files import Place, find_place, unwrapped
from surgery.formats.olmo_core.config import Found, Variant, read_model
from surgery.formats.olmo_core.write_config import to_json, write_config
from surgery.formats.table import Dialect, Rank, Row, Topology, gather, row, spread
from surgery.units import parse_size

VERSION = "3.0.0"  # of OLMo-core, whose checkpoints these are like
_B = "blocks.{l}."
_A = _B + "attention."
_E = _B + "feed_forward_moe.experts.mlp."

ROWS: tuple[Row, ...] = (
    row("embeddings.weight", "embed"),
    row(_B + "attention_norm.weight", "attn_norm"),
    row(_B + "attention_norm.bias", "attn_norm.bias"),
    row(_B + "attention_norm.weight", "attn_post_norm"),
    row(_A + "w_out.weight", "attn.o"),
    row(_A + "w_out.bias", "attn.o.bias"),
    row(_B + "feed_forward_norm.weight", "mlp_norm"),
    row(_B + "feed_forward_norm.bias", "mlp_norm.bias"),
    row(_B + "feed_forward_norm.weight", "mlp_post_norm"),
    row(_B + "feed_forward.w1.weight", "mlp.gate"),
    row(_B + "feed_forward.w1.bias", "mlp.gate.bias"),
    row(_B + "feed_forward.w2.weight", "mlp.down"),
    row(_B + "feed_forward.w2.bias", "mlp.down.bias"),
    row(_B + "feed_forward.w3.weight", "mlp.up"),
    row(_B + "feed_forward.w3.bias", "mlp.up.bias"),
    row(_B + "feed_forward_moe.router.weight", "router", layout="(e h)"),
    row(_B + "feed_forward_moe.router.score_bias", "router.bias"),
    row(_E + "w2", "experts.{e}.down", layout="(e m) h"),
    row("lm_head.norm.weight", "final_norm"),
    row("lm_head.norm.bias", "final_norm.bias"),
    row("lm_head.w_out.weight", "lm_head"),
    row("lm_head.w_out.weight", "embed", copy=True, when=lambda spec, _: spec.tied),
)
EXPERTS: Mapping[str, tuple[Row, ...]] = {
    "dropless": (
        row(_E + "w1", "experts.{e}.gate", layout="(e m) h"),
        row(_E + "w3", "experts.{e}.up", layout="(e m) h"),
    ),
    "default": (
        row(_E + "w1", "experts.{e}.gate", layout="(e h) m"),
        row(_E + "w3", "experts.{e}.up", layout="(e h) m"),
    ),
}
HALVES: tuple[Row, ...] = (
    row(_A + "w_q.weight", "attn.q"),
    row(_A + "w_q.bias", "attn.q.bias"),
    row(_A + "w_k.weight", "attn.k"),
    row(_A + "w_k.bias", "attn.k.bias"),
    row(_A + "w_v.weight", "attn.v"),
    row(_A + "w_v.bias", "attn.v.bias"),
)
NEIGHBOURS: tuple[Row, ...] = (
    row(_A + "w_q.weight", "attn.q", layout="(g n half two) h"),
    row(_A + "w_q.bias", "attn.q.bias", layout="(g n half two)"),
    row(_A + "w_k.weight", "attn.k", layout="(g half two) h"),
    row(_A + "w_k.bias", "attn.k.bias", layout="(g half two)"),
    row(_A + "w_v.weight", "attn.v"),
    row(_A + "w_v.bias", "attn.v.bias"),
)
FUSED: tuple[Row, ...] = (
    row(_A + "w_qkv.weight", "attn.q", "attn.k", "attn.v", layout="* h"),
    row(_A + "w_qkv.bias", "attn.q.bias", "attn.k.bias", "attn.v.bias", layout="*"),
)
NORMS: Mapping[bool, tuple[Row, ...]] = {
    False: (
        row(_A + "q_norm.weight", "attn.q_norm"),
        row(_A + "k_norm.weight", "attn.k_norm"),
        row(_A + "q_norm.weight", "attn.q_head_norm"),
        row(_A + "k_norm.weight", "attn.k_head_norm"),
    ),
    True: (
        row(_A + "q_norm.weight", "attn.q_norm", layout="(g n half two)"),
        row(_A + "k_norm.weight", "attn.k_norm", layout="(g half two)"),
        row(_A + "q_norm.weight", "attn.q_head_norm", layout="(half two)"),
        row(_A + "k_norm.weight", "attn.k_head_norm", layout="(half two)"),
    ),
}


def table(variant: Variant) -> Dialect:
    if variant.interleaved and variant.fused:
        raise ConfigError("complex rotary embeddings with a fused attention are not supported")
    attention = FUSED if variant.fused else NEIGHBOURS if variant.interleaved else HALVES
    return Dialect("olmo-core", (*ROWS, *attention, *NORMS[variant.interleaved], *EXPERTS[variant.experts]))


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "model_and_optim" / ".metadata").is_file()


def recognise(folder: Path) -> bool:
    return find_place(folder, _is_checkpoint) is not None


def open_olmo_core(folder: Path, options: Options) -> Checkpoint:
    """A checkpoint folder of OLMo-core, or a run's folder, whose newest checkpoint is taken.

    Raises SurgeryError naming every tensor and key that does not fit.
    """
    place = find_place(folder, _is_checkpoint)
    if place is None:
        raise FileError("holds no config.json with model_and_optim/.metadata", file=folder)
    file = place.folder / "config.json"
    config = read_json(file, "config.json")
    if not isinstance(config, dict):
        raise ConfigError("is no JSON object", file=file)
    positions = number(options, "max_positions")
    found = _with_kind(read_model(config, str(file), int(positions) if positions else None), options)
    stored = open_tensors(place.folder / "model_and_optim")
    tensors = unwrapped({k: t for k, t in stored.items() if not k.startswith("optim.")}, place.folder)
    gathered = gather(table(found.variant), {Rank(): tensors}, found.spec, Topology())
    tokens = tokenizer.find(place.folder)
    return Checkpoint(
        format="olmo-core",
        path=folder,
        spec=found.spec,
        parts=gathered.parts,
        config=config,
        facts=found.facts,
        files=tuple(Path(f.path) for f in stored.files),
        globals=stored.globals,
        ignored=gathered.ignored,
        notes=(*place.notes, *found.notes, *_left_out(place, len(stored) - len(tensors), found, tokens is None)),
        details=_details(place, found),
        tokenizer=tokens,
    )


def _with_kind(found: Found, options: Options) -> Found:
    """The experts' kind may be said on the command line, for configs that were edited."""
    kind = options["experts"]
    return found if kind == "auto" else replace(found, variant=replace(found.variant, experts=kind))


def _left_out(place: Place, optimizer: int, found: Found, bare: bool) -> list[str]:
    notes = [f"{optimizer} tensors of the optimizer's state are left out"] if optimizer else []
    if (place.folder / "train").exists():
        notes.append("the trainer's state (train) is left out")
    if bare and found.tokenizer:
        notes.append(f"config.json names the tokenizer {found.tokenizer!a}, which is not in the folder")
    return notes


def _details(place: Place, found: Found) -> dict[str, object]:
    details: dict[str, object] = {} if place.step is None else {"step": place.step}
    path = place.folder / ".metadata.json"
    said = read_json(path, ".metadata.json") if path.is_file() else None
    if isinstance(said, dict) and isinstance(said.get("version"), str):
        details["OLMo-core version"] = said["version"]
    details["rotary pairs"] = "neighbours (complex)" if found.variant.interleaved else "halves"
    if found.spec.experts:
        details["experts"] = found.variant.experts
    return details


def plan(checkpoint: Checkpoint, topology: Topology, options: Options) -> Output:
    """config.json, model_and_optim/ and the tokenizer: what OLMo-core's own converter from Hugging Face writes."""
    spec, facts, notes = checkpoint.spec, checkpoint.facts, []
    tokens = tokenizer.Carried((), ("no tokenizer was found, none is written (--tokenizer PATH adds one)",))
    if checkpoint.tokenizer is not None:
        tokens = tokenizer.carry(checkpoint.tokenizer)
        facts = {**checkpoint.tokenizer.ids(), **facts}
        if spec.true_vocab is None and (size := checkpoint.tokenizer.vocab_size) and size <= spec.vocab:
            spec = spec.replace(true_vocab=size)
    if len({p.dtype for p in checkpoint.parts.values()}) > 1:
        notes.append(f"the weights have several dtypes; config.json says {checkpoint.dtype} for all")
    experts = options["experts"] if options["experts"] != "auto" else "dropless"
    identifier = "tokenizer.json" if checkpoint.tokenizer is not None else None
    config = write_config(spec, facts, checkpoint.dtype, experts, identifier)
    if checkpoint.format == "olmo-core":
        config = {**checkpoint.config, "model": config["model"]}
    stored = spread(table(Variant(experts=experts)), checkpoint.parts, spec, topology)[Rank()]
    tensors = {f"model.{name}": s.tensor for name, s in stored.items()}
    size = parse_size(options["shard_size"])
    files = [
        text_file("config.json", to_json(config)),
        text_file(".metadata.json", to_json({"ephemeral": False, "version": VERSION})),
        *dcp_files(
            "model_and_optim/",
            tensors,
            planner={name: ("model", name.removeprefix("model.")) for name in tensors},
            copies=frozenset(f"model.{name}" for name, s in stored.items() if s.copy),
            file_bytes=size,
        ),
        *tokens.files,
    ]
    return Output(tuple(files), (*notes, *tokens.notes))


FORMAT = Format(
    name="olmo-core",
    title="OLMo-core: OLMo 2 and 3, FlexOlmo (config.json, model_and_optim/)",
    flags=(),
    options=(
        Option("experts", "which way experts lie: dropless, or default (transposed, drops tokens over capacity); auto: "
               "as config.json says when reading, dropless when writing", "auto", ("auto", "default", "dropless")),
        Option("max_positions", "longest context, which the model's config does not say; auto: the run's sequences",
               "auto", (), "read"),
        Option("shard_size", "largest .distcp file (same as --shard-size)", "5GB", (), "write"),
    ),
    recognise=recognise,
    open=open_olmo_core,
    plan=plan,
)  # fmt: skip
