"""OLMo (the `olmo` package, OLMo 1 to OLMo 2 and OLMoE): `config.yaml` beside model.pt, model.safetensors or shards.

table.py    the tensors                 files.py     five layouts on disk
config.py   config.yaml <-> Spec        sharded.py   OLMo's own sharded ones       names.py   pickled names
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from surgery import tokenizer
from surgery.containers.output import OutputFile, text_file
from surgery.containers.text import read_yaml
from surgery.containers.torch_writer import torch_file
from surgery.containers.yaml_writer import to_yaml
from surgery.errors import ConfigError
from surgery.formats.account import OPTIMIZER, READ, TRAINER, Rule
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
    mapping,
    number,
)
from surgery.formats.olmo import files, optimizer
from surgery.formats.olmo.config import kept, read_model, write_config
from surgery.formats.olmo.table import table
from surgery.formats.optimizer import States, Written
from surgery.formats.table import Table
from surgery.formats.topology import ONE_RANK, Rank, Topology
from surgery.formats.weave import Parts
from surgery.tokenizer import Carried, Tokenizer

FILES = (Rule(r"data-indices/", "the order of the run's data"),)
ENTRIES = (
    Rule(r"(optim|optimizer)(?:\..*)?", OPTIMIZER),
    Rule(r"(trainer)(?:\..*)?", TRAINER),
    Rule(r"model(?:\..*)?|modules(?:\..*)?", verdict=READ),  # read as pieces, each of which has to fit
)


def read(place: Place, options: Options) -> Opened:
    """A checkpoint's folder in any layout, or a run's, whose newest checkpoint is taken."""
    file = place.folder / "config.yaml"
    config, stored = mapping(file, read_yaml), files.read_tensors(place.folder)
    return Opened(config, str(file), {Rank(): stored.tensors}, stored.table.containers, (file, *stored.read),
                  details={"layout": stored.layout})  # fmt: skip


def spec(config: Config, file: str, seen: Any, options: Options) -> Reading:
    eos = number(options, "eos_token_id")
    found = read_model(config, file, None if eos is None else int(eos))
    return Reading(found.spec, found.notes, found.facts, variant=found.block_type, tokenizer=found.tokenizer,
                   padding="padded to embedding_size")  # fmt: skip


def states(place: Place, opened: Opened, reading: Reading, parts: Parts, options: Options) -> States | None:
    return optimizer.read_states(place.folder, str(opened.details["layout"]))


def stored_table(opened: Opened, reading: Reading, options: Options) -> Table:
    return table(reading.variant)


def draft(checkpoint: Checkpoint, topology: Topology, options: Options) -> Draft:
    """model.pt and config.yaml: what `OLMo.from_checkpoint` loads."""
    spec = checkpoint.spec
    block, group = _blocks(checkpoint, options)
    identifier = "gpt2" if checkpoint.tokenizer is None else "tokenizer.json"
    config = write_config(spec, checkpoint.facts, block, group, identifier)
    if checkpoint.format == "olmo":
        config = kept(checkpoint.config, config)
    rows = table("moe" if spec.experts else block)
    planned = partial(_files, config, group)
    return Draft(config, None, rows, ONE_RANK, planned, states=planned)


def _files(config: Config, group: int, ranks: Ranks, written: Written | None = None) -> Iterator[OutputFile]:
    stored, spell = ranks[Rank()], partial(files.grouped, size=group)
    yield text_file("config.yaml", to_yaml(config))
    yield torch_file("model.pt", {spell(name): s.tensor for name, s in stored.items()})
    if written:
        yield torch_file(optimizer.FILE, *optimizer.optim_tree(written, stored, spell))
        yield torch_file(optimizer.TRAINER, optimizer.trainer_tree(written.step))


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


def tokens(found: Tokenizer, checkpoint: Checkpoint) -> Carried:
    return tokenizer.carry(found)


FORMAT = Format(
    name="olmo",
    who="OLMo",
    title="OLMo, legacy (config.yaml with model.pt, model.safetensors or any sharded layout)",
    locate=files.locate,
    read=read,
    spec=spec,
    table=stored_table,
    draft=draft,
    tokens=tokens,
    files=FILES,
    entries=ENTRIES,
    states=states,
    options=(
        Option("eos_token_id", "the id of the end of text, where config.yaml has a wrong one (early ones say 0)",
               "auto", (), "read"),
        Option("block_type", "how blocks are built: sequential (att_proj fused) or llama (q, k, v apart); auto: as the "
               "model had it, else sequential", "auto", ("auto", "sequential", "llama"), "write"),
        Option("block_group_size", "how many blocks make a group in the tensors' names; auto: as the model had it, "
               "else 1", "auto", (), "write"),
    ),
)  # fmt: skip
