"""Meta's Llama releases: `params.json` beside `consolidated.NN.pth`, one file per model-parallel rank.

Layout after llama-models `models/llama3/model.py` and, for Llama 1 and 2, llama `llama/model.py`: column-parallel
weights are cut along their rows, row-parallel ones along their columns.  Rotary pairs lie side by side in `wq` and
`wk` (`half two`), where Hugging Face keeps the halves apart.  Llama 1, 2 and Code Llama cut the embedding along the
model width, Llama 3 along the vocabulary: the shapes tell which.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from surgery import tokenizer
from surgery.containers import open_file
from surgery.containers.output import text_file
from surgery.containers.text import read_json
from surgery.containers.torch_writer import torch_file
from surgery.errors import ConfigError, FileError, LayoutError, show
from surgery.formats.base import Checkpoint, Format, Option, Options, Output, number
from surgery.formats.meta import config as meta_params
from surgery.formats.table import Dialect, Rank, Row, Topology, gather, row, spread
from surgery.tensors.extent import Extent
from surgery.tensors.lazy import Lazy

_L = "layers.{l}."
ROWS: tuple[Row, ...] = (
    row(_L + "attention.wq.weight", "attn.q", layout="(g n half two) h", cut="g"),
    row(_L + "attention.wk.weight", "attn.k", layout="(g half two) h", cut="g"),
    row(_L + "attention.wv.weight", "attn.v", cut="g"),
    row(_L + "attention.wo.weight", "attn.o", cut="g"),
    row(_L + "feed_forward.w1.weight", "mlp.gate", cut="f"),
    row(_L + "feed_forward.w2.weight", "mlp.down", cut="f"),
    row(_L + "feed_forward.w3.weight", "mlp.up", cut="f"),
    row(_L + "attention_norm.weight", "attn_norm"),
    row(_L + "ffn_norm.weight", "mlp_norm"),
    row("norm.weight", "final_norm"),
    row("output.weight", "lm_head", cut="v"),
)
# A tied model stores its embedding under both names.
EMBEDDING: Mapping[str, tuple[Row, ...]] = {
    "width": (
        row("tok_embeddings.weight", "embed", cut="h"),
        row("output.weight", "embed", cut="v", copy=True, when=lambda spec, _: spec.tied),
    ),
    "vocab": (
        row("tok_embeddings.weight", "embed", cut="v"),
        row("output.weight", "embed", cut="v", copy=True, when=lambda spec, _: spec.tied),
    ),
}
IGNORED = ((r"(^|\.)rope\.freqs$", "a buffer that is computed from the rope base"),)


def table(embedding: str) -> Dialect:
    return Dialect("meta", (*EMBEDDING[embedding], *ROWS), IGNORED)


def _weight_files(folder: Path) -> list[Path]:
    """consolidated.00.pth .. in the order of their ranks, without a gap."""
    files = {
        int(m[1]): p
        for p in folder.glob("consolidated.*.pth")
        if (m := re.fullmatch(r"consolidated\.(\d{2,3})\.pth", p.name))
    }
    gap = next((i for i in range(len(files)) if i not in files), None)
    if gap is not None:
        raise FileError(
            f"consolidated.{gap:02d}.pth is missing", file=folder, hint="copy or download every rank's file"
        )
    return [files[i] for i in range(len(files))]


def recognise(folder: Path) -> bool:
    return (folder / "params.json").is_file() and any(folder.glob("consolidated.*.pth"))


def open_meta(folder: Path, options: Options) -> Checkpoint:
    """A folder of a Meta release, any number of ranks.  Raises SurgeryError naming all that does not fit."""
    params = read_json(folder / "params.json", "params.json")
    if not isinstance(params, dict):
        raise ConfigError("is no JSON object", file=folder / "params.json")
    files = _weight_files(folder)
    opened = [open_file(path) for path in files]
    shards = {Rank(tp=i): file.tensors for i, file in enumerate(opened)}
    tokens = tokenizer.find(folder)
    evidence = _evidence(shards, params, folder)
    spec, notes = meta_params.read_params(
        params,
        str(folder / "params.json"),
        evidence,
        tiktoken=tokens is not None and tokens.native_kind == "tiktoken",
        rope_factor=number(options, "rope_factor"),
        positions=number(options, "max_positions"),
    )
    topology = Topology(tp=len(files))
    gathered = gather(table(evidence.embedding), shards, spec, topology)
    return Checkpoint(
        format="meta",
        path=folder,
        spec=spec,
        parts=gathered.parts,
        topology=topology,
        config=params,
        files=tuple(files),
        globals=tuple(sorted({g for file in opened for g in file.globals})),
        ignored=gathered.ignored,
        notes=tuple(notes),
        details={"embedding cut along": "the vocabulary" if evidence.embedding == "vocab" else "the model width"},
        tokenizer=tokens,
    )


def _evidence(
    shards: Mapping[Rank, Mapping[str, Lazy]], params: Mapping[str, object], folder: Path
) -> meta_params.Evidence:
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
    dim = params.get("dim")
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
    tied = embedding == "vocab" and _looks_equal(first["tok_embeddings.weight"], first["output.weight"])
    return meta_params.Evidence(vocab, shapes["layers.0.feed_forward.w1.weight"][0] * ranks, embedding, tied)


def _looks_equal(a: Lazy, b: Lazy) -> bool:
    """Whether two tensors agree in a few rows; every row is compared when the weights are read."""
    if not (isinstance(a, Extent) and isinstance(b, Extent)) or (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if a.strides or b.strides:
        return bool((a[:1] == b[:1]).all())
    size = a.nbytes // a.shape[0]
    rows = {0, a.shape[0] // 3, a.shape[0] // 2, a.shape[0] - 1}
    return all(a.file.read(a.offset + r * size, size) == b.file.read(b.offset + r * size, size) for r in rows)


def plan(checkpoint: Checkpoint, topology: Topology, options: Options) -> Output:
    """params.json, consolidated.NN.pth and the tokenizer for a checkpoint of any format that is a Llama."""
    spec = checkpoint.spec
    meta_params.refuse_misfits(spec)
    embedding, notes = options.get("embedding", "auto"), []
    if embedding == "auto":
        embedding = "vocab" if meta_params.is_llama3(spec) else "width"
        if topology.tp > 1:
            like = "the vocabulary, as Llama 3 does" if embedding == "vocab" else "the model width, as Llama 1 and 2 do"
            notes.append(f"the embedding is cut along {like} (-O embedding=vocab|width decides otherwise)")
    params, more = meta_params.write_params(spec, number(options, "rope_factor"))
    if len({p.dtype for p in checkpoint.parts.values()}) > 1:
        notes.append("the weights have several dtypes; Meta's loader casts them all to one")
    ranks = spread(table(embedding), checkpoint.parts, spec, topology)
    tokens = tokenizer.Carried((), ("no tokenizer was found, none is written (--tokenizer PATH adds one)",))
    if checkpoint.tokenizer is not None:
        tokens = tokenizer.for_meta(checkpoint.tokenizer, vocab_size=spec.vocab)
    files = [
        torch_file(
            f"consolidated.{rank.tp:02d}.pth",
            {name: s.tensor for name, s in stored.items()},
            frozenset(name for name, s in stored.items() if s.copy),
        )
        for rank, stored in ranks.items()
    ]
    return Output(
        (text_file("params.json", meta_params.to_json(params)), *files, *tokens.files), (*notes, *more, *tokens.notes)
    )


FORMAT = Format(
    name="meta",
    title="Meta Llama 1 to 3.3 (params.json, consolidated.NN.pth)",
    flags=("tp",),
    options=(
        Option("embedding", "how ranks share the embedding: vocab (Llama 3) or width (Llama 1, 2); auto: by the model",
               "auto", ("auto", "vocab", "width"), "write"),
        Option("rope_factor", "factor of the scaled rope, which params.json hides; auto: 32 if tied (3.2), else 8",
               "auto"),
        Option("max_positions", "longest context, which params.json does not say; auto: by the generation", "auto",
               (), "read"),
    ),
    recognise=recognise,
    open=open_meta,
    plan=plan,
)  # fmt: skip
