"""Meta's Llama releases: `params.json` beside `consolidated.NN.pth`, one file per model-parallel rank.

table.py   the tensors          config.py   params.json <-> Spec

params.json says little: the vocabulary, the ffn width, whether embeddings are tied and how ranks cut them are seen in
the tensors' shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from surgery import tokenizer
from surgery.containers import open_file
from surgery.containers.output import OutputFile, text_file
from surgery.containers.text import read_json
from surgery.containers.torch_writer import torch_file
from surgery.errors import FileError, LayoutError, show
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
from surgery.formats.meta.config import Evidence, is_llama3, read_params, to_json, write_params
from surgery.formats.meta.table import table
from surgery.formats.table import Table
from surgery.formats.topology import Rank, Topology
from surgery.formats.weave import Shards
from surgery.tensors.extent import look_equal
from surgery.tokenizer import Carried, Tokenizer

_CUT = {"vocab": "the vocabulary", "width": "the model width"}


def locate(folder: Path) -> Place | None:
    here = (folder / "params.json").is_file() and any(folder.glob("consolidated.*.pth"))
    return Place(folder, folder) if here else None


def _weight_files(folder: Path) -> list[Path]:
    """consolidated.00.pth .. in the order of their ranks, without a gap."""
    files = {
        int(m[1]): p
        for p in folder.glob("consolidated.*.pth")
        if (m := re.fullmatch(r"consolidated\.(\d{2,3})\.pth", p.name))
    }
    gap = next((i for i in range(len(files)) if i not in files), None)
    if gap is not None or not files:
        raise FileError(
            f"consolidated.{gap or 0:02d}.pth is missing", file=folder, hint="copy or download every rank's file"
        )
    return [files[i] for i in range(len(files))]


def read(place: Place, options: Options) -> Opened:
    """Any number of ranks."""
    file = place.folder / "params.json"
    params = mapping(file, read_json)
    opened = [open_file(path) for path in _weight_files(place.folder)]
    shards = {Rank(tp=i): opened.tensors for i, opened in enumerate(opened)}
    tiktoken = place.tokenizer is not None and place.tokenizer.native_kind == "tiktoken"
    seen = _evidence(shards, params.get("dim"), place.folder, tiktoken)
    return Opened(params, str(file), shards, tuple(opened), (file,), seen, Topology(tp=len(opened)))


def _evidence(shards: Shards, dim: object, folder: Path, tiktoken: bool) -> Evidence:
    """What the shapes of rank 0 say: the vocabulary, the ffn width, how the embedding is cut, whether it is tied."""
    ranks, first = len(shards), shards[Rank()]
    shapes = {}
    for name in ("tok_embeddings.weight", "output.weight", "layers.0.feed_forward.w1.weight"):
        if name not in first or len(first[name].shape) != 2:
            hint = (
                "Llama 4 and vision models are not read"
                if any("w_in_shared" in n or "vision" in n for n in first)
                else None
            )
            raise LayoutError(
                f"consolidated.00.pth has no matrix {name}: {show(sorted(first)[:3])}", file=folder, hint=hint
            )
        shapes[name] = first[name].shape
    rows, width = shapes["tok_embeddings.weight"]
    if width == dim:
        embedding, vocab = "vocab", rows * ranks  # one rank alone has both cuts
    elif width * ranks == dim:
        embedding, vocab = "width", rows
    else:
        raise LayoutError(
            f"tok_embeddings.weight is {rows} x {width} on each of {ranks} ranks, which fits no cut of dim {show(dim)}",
            file=folder / "consolidated.00.pth",
            hint="are all consolidated.NN.pth of the release in the folder?",
        )
    if shapes["output.weight"][0] * ranks != vocab:
        rows = shapes["output.weight"][0]
        raise LayoutError(
            f"output.weight has {rows} rows on each of {ranks} ranks, but the embedding {vocab}",
            file=folder / "consolidated.00.pth",
        )
    tied = embedding == "vocab" and look_equal(first["tok_embeddings.weight"], first["output.weight"])
    return Evidence(vocab, shapes["layers.0.feed_forward.w1.weight"][0] * ranks, embedding, tied, tiktoken)


def spec(config: Config, file: str, seen: Evidence, options: Options) -> Reading:
    factor, positions = number(options, "rope_factor"), number(options, "max_positions")
    found, notes = read_params(config, file, seen, rope_factor=factor, positions=positions)
    return Reading(found, tuple(notes), details={"embedding cut along": _CUT[seen.embedding]})


def stored_table(opened: Opened, reading: Reading, options: Options) -> Table:
    return table(opened.seen.embedding)


def draft(checkpoint: Checkpoint, topology: Topology, options: Options) -> Draft:
    """params.json and consolidated.NN.pth."""
    spec, embedding, notes = checkpoint.spec, options["embedding"], []
    if embedding == "auto":
        embedding = "vocab" if is_llama3(spec) else "width"
        if topology.tp > 1:
            like = f"{_CUT[embedding]}, as Llama {'3 does' if embedding == 'vocab' else '1 and 2 do'}"
            notes.append(f"the embedding is cut along {like} (-O embedding=vocab|width decides otherwise)")
    params, more = write_params(spec, number(options, "rope_factor"))
    if len({p.dtype for p in checkpoint.parts.values()}) > 1:
        notes.append("the weights have several dtypes; Meta's loader casts them all to one")
    seen = Evidence(spec.vocab, spec.ffn, embedding, spec.tied)
    return Draft(params, seen, table(embedding), topology, partial(_files, params), (*notes, *more))


def _files(params: Config, ranks: Ranks) -> Iterable[OutputFile]:
    yield text_file("params.json", to_json(params))
    for rank, stored in ranks.items():
        copies = frozenset(name for name, s in stored.items() if s.copy)
        yield torch_file(f"consolidated.{rank.tp:02d}.pth", {name: s.tensor for name, s in stored.items()}, copies)


def tokens(found: Tokenizer, checkpoint: Checkpoint) -> Carried:
    return tokenizer.for_meta(found, vocab_size=checkpoint.spec.vocab)


FORMAT = Format(
    name="meta",
    who="Meta's format",
    title="Meta Llama 1 to 3.3 (params.json, consolidated.NN.pth)",
    locate=locate,
    read=read,
    spec=spec,
    table=stored_table,
    draft=draft,
    tokens=tokens,
    flags=("tp",),
    options=(
        Option("embedding", "how ranks share the embedding: vocab (Llama 3) or width (Llama 1, 2); auto: by the model",
               "auto", ("auto", "vocab", "width"), "write"),
        Option("rope_factor", "factor of the scaled rope, which params.json hides; auto: 32 if tied (3.2), else 8",
               "auto"),
        Option("max_positions", "longest context, which params.json does not say; auto: by the generation", "auto",
               (), "read"),
    ),
)  # fmt: skip
