"""OLMo-core (OLMo 2, OLMo 3, FlexOlmo and whatever its `Transformer` builds): `config.json`, `model_and_optim/`.

table.py   the tensors       config.py   config.json -> Spec (rope.py: of ropes and windows)      write_config.py   back
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from surgery import tokenizer
from surgery.containers import open_tensors
from surgery.containers.dcp import Dcp
from surgery.containers.dcp_writer import dcp_files
from surgery.containers.output import OutputFile, text_file
from surgery.containers.text import read_json
from surgery.formats.account import OPTIMIZER, Rule
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
from surgery.formats.olmo.files import find_place, unwrapped
from surgery.formats.olmo_core import optimizer
from surgery.formats.olmo_core.config import Variant, read_model
from surgery.formats.olmo_core.table import table
from surgery.formats.olmo_core.write_config import to_json, write_config
from surgery.formats.optimizer import States, Written
from surgery.formats.padding import multiple_of
from surgery.formats.table import Table
from surgery.formats.topology import ONE_RANK, Rank, Topology
from surgery.formats.weave import Parts
from surgery.tokenizer import Carried, Tokenizer
from surgery.units import shard_size

VERSION = "3.0.0"  # of OLMo-core, whose checkpoints these are like
FILES = (Rule(r"data_paths\.txt", "where the run's data lie"),)
ENTRIES = (Rule(r"(optim)\..*", OPTIMIZER),)


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "model_and_optim" / ".metadata").is_file()


def locate(folder: Path) -> Place | None:
    return find_place(folder, _is_checkpoint)


def read(place: Place, options: Options) -> Opened:
    """A checkpoint's folder, or a run's, whose newest checkpoint is taken."""
    file, version = place.folder / "config.json", place.folder / ".metadata.json"
    config = mapping(file, read_json)
    stored = open_tensors(place.folder / "model_and_optim")
    tensors = unwrapped({k: t for k, t in stored.items() if not k.startswith("optim.")}, place.folder)
    read = (file, version) if version.is_file() else (file,)
    said = mapping(version, read_json) if version.is_file() else {}
    details = {"OLMo-core version": said["version"]} if isinstance(said.get("version"), str) else {}
    states = [t.nbytes for name, t in stored.items() if name.startswith("optim.")]
    details |= {"optimizer": f"{len(states)} tensors, {sum(states)} bytes"} if states else {}
    return Opened(config, str(file), {Rank(): tensors}, stored.containers, read, details=details)


def spec(config: Config, file: str, seen: Any, options: Options) -> Reading:
    """The experts' kind may be said on the command line, for configs that were edited."""
    positions = number(options, "max_positions")
    found = read_model(config, file, int(positions) if positions else None)
    kind = options["experts"]
    variant = found.variant if kind == "auto" else replace(found.variant, experts=kind)
    details = {"rotary pairs": "neighbours (complex)" if variant.interleaved else "halves"}
    details |= {"experts": variant.experts} if found.spec.experts else {}
    padding = multiple_of(found.spec.vocab, 128)  # as its TokenizerConfig.padded_vocab_size does
    return Reading(found.spec, found.notes, found.facts, details, variant, found.tokenizer, padding)


def states(place: Place, opened: Opened, reading: Reading, parts: Parts, options: Options) -> States | None:
    said = number(options, "optimizer_step")
    dcp = next(c for c in opened.containers if isinstance(c, Dcp))
    return optimizer.read_states(dcp, place.folder, None if said is None else int(said))


def stored_table(opened: Opened, reading: Reading, options: Options) -> Table:
    return table(reading.variant)


def draft(checkpoint: Checkpoint, topology: Topology, options: Options) -> Draft:
    """config.json and model_and_optim/: what OLMo-core's own converter from Hugging Face writes."""
    spec, notes = checkpoint.spec, []
    if len({p.dtype for p in checkpoint.parts.values()}) > 1:
        notes.append(f"the weights have several dtypes; config.json says {checkpoint.dtype} for all")
    experts = options["experts"] if options["experts"] != "auto" else "dropless"
    identifier = "tokenizer.json" if checkpoint.tokenizer is not None else None
    config = write_config(spec, checkpoint.facts, checkpoint.dtype, experts, identifier)
    if checkpoint.format == "olmo-core":
        config = {**checkpoint.config, "model": config["model"]}
    files = partial(_files, config, shard_size(options["shard_size"]))
    return Draft(config, None, table(Variant(experts=experts)), ONE_RANK, files, tuple(notes), states=files)


def _files(config: Config, limit: int, ranks: Ranks, written: Written | None = None) -> Iterable[OutputFile]:
    stored = {f"model.{name}": s for name, s in ranks[Rank()].items()}
    states, objects = optimizer.stored_states(written, ranks[Rank()]) if written else ({}, {})
    stored |= states
    return [
        text_file("config.json", to_json(config)),
        text_file(".metadata.json", to_json({"ephemeral": False, "version": VERSION})),
        *dcp_files(
            "model_and_optim/",
            {name: s.tensor for name, s in stored.items()},
            objects,
            planner={name: tuple(name.split(".", 1)) for name in (*stored, *objects)},
            copies=frozenset(name for name, s in stored.items() if s.copy),
            file_bytes=limit,
        ),
    ]


def tokens(found: Tokenizer, checkpoint: Checkpoint) -> Carried:
    return tokenizer.carry(found)


FORMAT = Format(
    name="olmo-core",
    who="OLMo-core",
    title="OLMo-core: OLMo 2 and 3, FlexOlmo (config.json, model_and_optim/)",
    locate=locate,
    read=read,
    spec=spec,
    table=stored_table,
    draft=draft,
    tokens=tokens,
    files=FILES,
    entries=ENTRIES,
    states=states,
    options=(
        Option("experts", "which way experts lie: dropless, or default (transposed, drops tokens over capacity); auto: "
               "as config.json says when reading, dropless when writing", "auto", ("auto", "default", "dropless")),
        Option("max_positions", "longest context, which the model's config does not say; auto: the run's sequences",
               "auto", (), "read"),
        Option("optimizer_step", "the optimizer's updates, where its run never counted them; auto: as it says",
               "auto", (), "read"),
        Option("shard_size", "largest .distcp file (same as --shard-size)", "5GB", (), "write"),
    ),
)  # fmt: skip
