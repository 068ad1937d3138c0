"""Hugging Face: `config.json` beside safetensors (or pytorch_model.bin) files, single or sharded with an index.

families.py   what the keys of each family mean      table.py   the tensors
config.py     config.json <-> Spec (moe.py: of experts)      files.py   the weight files
optimizer.py  a Trainer's state (order.py: its numbers)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from surgery import tokenizer
from surgery.containers import open_tensors
from surgery.containers.opening import shards
from surgery.containers.output import OutputFile, text_file
from surgery.containers.text import read_json
from surgery.errors import ConfigError
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
)
from surgery.formats.hf import sparse
from surgery.formats.hf.config import choose_family, misfits, read_config, write_config
from surgery.formats.hf.families import FAMILIES
from surgery.formats.hf.files import check_code, code_of, to_json, weight_files
from surgery.formats.hf.further import further, without
from surgery.formats.hf.heads import settled
from surgery.formats.hf.optimizer import WRITERS, in_memory, notes_of, read_states
from surgery.formats.hf.rope import CLASSIC as ROPE
from surgery.formats.hf.table import table
from surgery.formats.optimizer import States, Written
from surgery.formats.table import Table
from surgery.formats.topology import ONE_RANK, Rank, Topology
from surgery.formats.weave import Parts
from surgery.formats.wrappers import unwrapped
from surgery.model.wording import in_words
from surgery.tokenizer import Carried, Tokenizer
from surgery.units import shard_size


def locate(folder: Path) -> Place | None:
    weights = [f"{stem}{end}" for stem in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]
    here = (folder / "config.json").is_file() and (
        any((folder / name).is_file() for name in weights) or bool(shards(folder))
    )
    return Place(folder, folder) if here else None


def read(place: Place, options: Options) -> Opened:
    file = place.folder / "config.json"
    stated, stored = mapping(file, read_json), open_tensors(place.folder)
    read = [file, *([] if stored.index is None else [stored.index])]
    family = FAMILIES.get(str(stated.get("model_type")))
    code = [place.folder / name for name in _code(family.code if family else "", stated)]
    read += [path for path in code if path.is_file()]
    tensors, notes = unwrapped(stored)
    config: Config = stated
    if family and stated.get("tie_word_embeddings", family.absent["tie_word_embeddings"]) is True:
        config, tensors, more = settled(stated, tensors, table(family.model_type, tensors), options["tied"], str(file))
        notes += more
    notes += [note for path in code for note in check_code(path)]
    if stored.index is None and len(stored.containers) > 1:
        notes.append("the shards have no index; all of them are there, and no name is in two of them")
    return Opened(config, str(file), {Rank(): tensors}, stored.containers, tuple(read), notes=tuple(notes))


def spec(config: Config, file: str, seen: Any, options: Options) -> Reading:
    found, facts, notes = read_config(config, file)
    return Reading(found, tuple(notes), facts)


def stored_table(opened: Opened, reading: Reading, options: Options) -> Table:
    return table(reading.spec.family, opened.shards[Rank()], further(opened.config))


def states(place: Place, opened: Opened, reading: Reading, parts: Parts, options: Options) -> States | None:
    return read_states(place.folder, reading.spec, parts)


def draft(checkpoint: Checkpoint, topology: Topology, options: Options) -> Draft:
    """config.json and the weights, of a family that holds the model."""
    family = options["family"]
    if family == "auto":
        family = choose_family(checkpoint.spec)
    elif gaps := misfits(checkpoint.spec, family):
        raise ConfigError(f"a {family} cannot hold this model: {in_words(gaps)}")
    config = write_config(checkpoint.spec, checkpoint.facts, checkpoint.dtype, family)
    if checkpoint.format == "hf" and family == checkpoint.config.get("model_type"):
        config = _kept(checkpoint, config)
    code, notes = _code(FAMILIES[family].code, config), []
    if checkpoint.spec.sparse:
        config |= sparse.auto_map(FAMILIES[family].architecture)
        notes = [sparse.NOTE]
    elif code:
        notes = ["the folder runs code of its own: load it with trust_remote_code=True"]
    files = partial(_files, config, shard_size(options["shard_size"]), code)
    states = partial(_with_states, files, family, options["optimizer"])
    notes += notes_of(checkpoint.optimizer, family, options["optimizer"]) if checkpoint.optimizer else ()
    return Draft(config, None, table(family), ONE_RANK, files, tuple(notes), states=states,
                 states_lie=(in_memory(family), ONE_RANK))  # fmt: skip


def _code(of_family: str, config: Config) -> tuple[str, ...]:
    """The modules that a folder carries."""
    return (*([of_family] if of_family else []), *(sparse.MODULES if sparse.KEY in config else ()))


def _files(config: Config, limit: int, code: Sequence[str], ranks: Ranks) -> Iterable[OutputFile]:
    own = [text_file(name, code_of(name)) for name in code]
    return [text_file("config.json", to_json(config)), *own, *weight_files(ranks[Rank()], limit)]


def _with_states(
    files: Callable[[Ranks], Iterable[OutputFile]], family: str, form: str, ranks: Ranks, written: Written
) -> Iterable[OutputFile]:
    return [*files(ranks), *WRITERS[form](written, family)]


def _kept(checkpoint: Checkpoint, config: dict[str, object]) -> dict[str, object]:
    """From Hugging Face to itself, the config stays as it was wherever it means the same."""
    anew = ("dtype", "torch_dtype", *((sparse.KEY, "auto_map") if sparse.KEY in checkpoint.config else ()))
    old = {k: v for k, v in checkpoint.config.items() if k not in anew} | sparse.write_sparse(checkpoint.spec.sparse)
    old = without(old)
    same = read_config(old, "config.json")[0].differences(checkpoint.spec).keys() <= {"true_vocab"}
    if not same:
        return {**old, **config}
    also = {*ROPE, *FAMILIES[str(config["model_type"])].aliases}  # transformers 4 reads no other
    classic = {k: v for k, v in config.items() if k in also and old.get(k) is None}
    return {**old, **classic, "torch_dtype": config["torch_dtype"]}


def tokens(found: Tokenizer, checkpoint: Checkpoint) -> Carried:
    ids = {k.removesuffix("_token_id"): v for k, v in checkpoint.facts.items() if k.endswith("_token_id")}
    return tokenizer.for_hf(
        found,
        vocab_size=checkpoint.spec.vocab,
        max_length=checkpoint.spec.context or 2048,
        ids={k: v for k, v in ids.items() if type(v) is int},
    )


FORMAT = Format(
    name="hf",
    who="Hugging Face's family",
    title="Hugging Face (config.json, *.safetensors; also reads pytorch_model*.bin)",
    locate=locate,
    read=read,
    spec=spec,
    table=stored_table,
    draft=draft,
    tokens=tokens,
    states=states,
    options=(
        Option("tied", "whether the head is the embedding, where files disagree with config.json", "auto",
               ("auto", "yes", "no"), "read"),
        Option("family", "the model_type to write; auto: the source's, else the first that holds it exactly", "auto",
               ("auto", *FAMILIES), "write"),
        Option("optimizer", "with --optimizer: trainer (optimizer.pt) or fsdp (optimizer_0/, by name, for torch's DCP)",
               "trainer", tuple(WRITERS), "write", of_optimizer=True),
        Option("shard_size", "largest weight file (same as --shard-size)", "5GB", (), "write"),
    ),
)  # fmt: skip
