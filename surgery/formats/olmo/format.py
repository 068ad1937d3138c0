"""OLMo (the `olmo` package, OLMo 1 to OLMo 2 and OLMoE): `config.yaml` beside model.pt, model.safetensors or shards.

Names and layouts: allenai/OLMo `olmo/model.py`; experts: megablocks as used on the branch of OLMoE.  `ff_proj` holds
up above gate (silu is applied to its second half), `att_proj` q, k and v one above the other; rotary halves lie
apart, as in Hugging Face.  The norms keep their names when `norm_after` moves them behind attention and mlp.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from surgery import tokenizer
from surgery.containers.output import text_file
from surgery.containers.text import read_yaml
from surgery.containers.torch_writer import torch_file
from surgery.errors import ConfigError, FileError
from surgery.formats.base import Checkpoint, Format, Option, Options, Output, number
from surgery.formats.olmo import config as olmo_config
from surgery.formats.olmo import files as olmo_files
from surgery.formats.olmo.files import grouped, locate
from surgery.formats.table import Dialect, Rank, Row, Topology, gather, row, spread

_B = "transformer.blocks.{l}."

ROWS: tuple[Row, ...] = (
    row("transformer.wte.weight", "embed"),
    row("transformer.wpe.weight", "positions"),
    row(_B + "attn_norm.weight", "attn_norm"),
    row(_B + "attn_norm.bias", "attn_norm.bias"),
    row(_B + "attn_norm.weight", "attn_post_norm"),
    row(_B + "q_norm.weight", "attn.q_norm"),
    row(_B + "k_norm.weight", "attn.k_norm"),
    row(_B + "attn_out.weight", "attn.o"),
    row(_B + "ff_norm.weight", "mlp_norm"),
    row(_B + "ff_norm.bias", "mlp_norm.bias"),
    row(_B + "ff_norm.weight", "mlp_post_norm"),
    row(_B + "ff_proj.weight", "mlp.up", "mlp.gate", layout="(* f) h"),
    row(_B + "ff_proj.weight", "mlp.up", when=lambda spec, _: not spec.glu),
    row(_B + "ff_out.weight", "mlp.down"),
    row(_B + "ffn.router.layer.weight", "router"),
    row(_B + "ffn.experts.mlp.w1", "experts.{e}.gate", layout="(e m) h"),
    row(_B + "ffn.experts.mlp.v1", "experts.{e}.up", layout="(e m) h"),
    row(_B + "ffn.experts.mlp.w2", "experts.{e}.down", layout="(e m) h"),
    row("transformer.ln_f.weight", "final_norm"),
    row("transformer.ln_f.bias", "final_norm.bias"),
    row("transformer.ff_out.weight", "lm_head"),
    row("transformer.ff_out.weight", "embed", optional=True, when=lambda spec, _: spec.tied),
)
_FUSED = (row(_B + "att_proj.weight", "attn.q", "attn.k", "attn.v", layout="* h"),)
ATTENTION: Mapping[str, tuple[Row, ...]] = {
    "sequential": _FUSED,
    "moe": _FUSED,
    "llama": (
        row(_B + "q_proj.weight", "attn.q"),
        row(_B + "k_proj.weight", "attn.k"),
        row(_B + "v_proj.weight", "attn.v"),
    ),
}
IGNORED = (
    (r"\.rotary_emb\.inv_freq$", "a buffer that is computed from the rope base"),
    (r"^transformer\.(causal_mask|alibi_attention_bias|causal_attention_bias)$", "a constant mask of old releases"),
)


def table(block: str) -> Dialect:
    return Dialect("olmo", (*ROWS, *ATTENTION[block]), IGNORED)


def recognise(folder: Path) -> bool:
    return locate(folder) is not None


def open_olmo(folder: Path, options: Options) -> Checkpoint:
    """A checkpoint folder of OLMo in any of its layouts, or a run's folder, whose newest checkpoint is taken.

    Raises SurgeryError naming every tensor and key that does not fit.
    """
    place = locate(folder)
    if place is None:
        raise FileError(
            "holds no checkpoint of OLMo", file=folder, hint="looked for config.yaml beside model.pt or shards"
        )
    file = place.folder / "config.yaml"
    config = read_yaml(file, "config.yaml")
    if not isinstance(config, dict):
        raise ConfigError("holds no mapping", file=file)
    eos = number(options, "eos_token_id")
    found = olmo_config.read_model(config, str(file), None if eos is None else int(eos))
    stored = olmo_files.read_tensors(place)
    gathered = gather(table(found.block_type), {Rank(): stored.tensors}, found.spec, Topology())
    tokens, notes = tokenizer.find(place.folder), [*place.notes, *found.notes, *stored.notes]
    if tokens is None and found.tokenizer:
        notes.append(f"config.yaml names the tokenizer {found.tokenizer!a}, which is not in the folder")
    return Checkpoint(
        format="olmo",
        path=folder,
        spec=found.spec,
        parts=gathered.parts,
        config=config,
        facts=found.facts,
        files=stored.files,
        globals=stored.globals,
        ignored=gathered.ignored,
        notes=tuple(notes),
        details=stored.details,
        tokenizer=tokens,
    )


def plan(checkpoint: Checkpoint, topology: Topology, options: Options) -> Output:
    """model.pt, config.yaml and the tokenizer: what `OLMo.from_checkpoint` loads."""
    spec, facts = checkpoint.spec, checkpoint.facts
    block, group = _blocks(checkpoint, options)
    tokens = tokenizer.Carried((), ("no tokenizer was found, none is written (--tokenizer PATH adds one)",))
    identifier = "gpt2"
    if checkpoint.tokenizer is not None:
        tokens, identifier = tokenizer.carry(checkpoint.tokenizer), "tokenizer.json"
        facts = {**checkpoint.tokenizer.ids(), **facts}
        if spec.true_vocab is None and (size := checkpoint.tokenizer.vocab_size) and size <= spec.vocab:
            spec = spec.replace(true_vocab=size)
    config = olmo_config.write_config(spec, facts, block, group, identifier)
    if checkpoint.format == "olmo":
        config = olmo_config.kept(checkpoint.config, config)
    stored = spread(table("moe" if spec.experts else block), checkpoint.parts, spec, topology)[Rank()]
    tensors = {grouped(name, group): s.tensor for name, s in stored.items()}
    files = [text_file("config.yaml", olmo_config.to_yaml(config)), torch_file("model.pt", tensors), *tokens.files]
    return Output(tuple(files), tokens.notes)


def _blocks(checkpoint: Checkpoint, options: Options) -> tuple[str, int]:
    """How blocks are built and grouped: by the options, else as the model was when OLMo last wrote it."""
    facts, layers = checkpoint.facts, checkpoint.spec.layers
    block = options["block_type"]
    if block == "auto":
        block = "llama" if facts.get("olmo_block_type") == "llama" else "sequential"
    kept = facts.get("olmo_block_group_size")
    group = int(number(options, "block_group_size") or (kept if type(kept) is int and 0 < kept else 1))
    if layers % group:
        raise ConfigError(f"{layers} layers are no multiple of a block_group_size of {group}")
    return block, group


FORMAT = Format(
    name="olmo",
    title="OLMo, legacy (config.yaml with model.pt, model.safetensors or any sharded layout)",
    flags=(),
    options=(
        Option("eos_token_id", "the id of the end of text, where config.yaml has a wrong one (early ones say 0)",
               "auto", (), "read"),
        Option("block_type", "how blocks are built: sequential (att_proj fused) or llama (q, k, v apart); auto: as the "
               "model had it, else sequential", "auto", ("auto", "sequential", "llama"), "write"),
        Option("block_group_size", "how many blocks make a group in the tensors' names; auto: as the model had it, "
               "else 1", "auto", (), "write"),
    ),
    recognise=recognise,
    open=open_olmo,
    plan=plan,
)  # fmt: skip
