"""Hugging Face folders of any family merged tensor by tensor, where the models agree name by name and shape by shape.

    found = agreeing(recipe)                    # the folders, or why they do not agree
    with prepared(recipe, found, Soup()) as merge:
        report = merge.write(Path("merged"))

No table is needed: classifiers, reward and embedding models, models that see, and families that are not in `formats`
are merged as they are stored.  The config and all small files are the donor's.  Before the output appears, what
transformers makes of it is compared with what it makes of the donor.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import surgery
from surgery import tokenizer
from surgery.containers import open_tensors
from surgery.containers.output import OutputFile, copied_file, text_file
from surgery.containers.text import json_text, read_json
from surgery.conversion.numbers import remarks
from surgery.conversion.report import Report
from surgery.errors import LayoutError, UsageError, shown, some
from surgery.formats.account import CARRIED, Rule, beside
from surgery.formats.base import PROVENANCE, main_dtype
from surgery.formats.hf.files import weight_files
from surgery.formats.weave import Stored
from surgery.merging.assemble import Given, Tensor, idle_filters, merged_tensor
from surgery.merging.depth import fitted, layers_of, stated
from surgery.merging.engine.pending import settled
from surgery.merging.engine.pool import Engine, compiled_loops
from surgery.merging.layers import out_layers, span
from surgery.merging.reader import Reference
from surgery.merging.recipe import OutputSlice, Recipe
from surgery.merging.references import model_folder
from surgery.merging.request import Soup
from surgery.merging.tokens import with_template
from surgery.running.expected import check_loads, readable, understood
from surgery.tensors.files import check_unchanged, size_of, watched
from surgery.tensors.fingerprint import SOURCE, Ledger
from surgery.tensors.lazy import Lazy, Same
from surgery.tensors.stamp import Stamp
from surgery.units import shard_size
from surgery.writing import stream
from surgery.writing.ahead import cores
from surgery.writing.readback import Spoilt
from surgery.writing.scratch import scratch
from surgery.writing.staging import data_of

RECORD = "soup.json"
FLOATS = ("float64", "float32", "bfloat16", "float16")
_NUMBERED = re.compile(r"(.*?(?:^|\.)(?:layers|h|blocks|layer)\.)(\d{1,6})(\..+)")
_FIRST = re.compile(r"embed|wte|wpe")  # what stands before the layers, by its name
_SMALL = re.compile(r"(?:(?:pre|video_pre|image_)?processor_config|modules|config_sentence_transformers|"
                    r"sentence_\w+_config)\.json")  # fmt: skip


@dataclass(frozen=True)
class Folder:
    """A model as it is stored."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Lazy]
    files: tuple[Path, ...]
    stamps: Mapping[str, Stamp]

    @property
    def layers(self) -> int:
        return layers_of(self.config)


Folders = Mapping[Reference, Folder]
Place = tuple[str, int, str]  # of a tensor in a layer: what stands before the layer's number, the number, the rest


def agreeing(recipe: Recipe) -> Folders | str:
    """The models' folders, or in words why they cannot be merged by their names."""
    if any(model.lora for model in recipe.models()):
        return "an adapter is given"
    if recipe.vocabulary or recipe.align:
        return "tokenizer, tokenizer_source and align need to know which tensor is which"
    folders = {model: _open(model_folder(model)) for model in recipe.models()}
    donor = folders[recipe.donor]
    for model, folder in folders.items():
        if wrong := _difference(recipe, donor, folder):
            return f"{model} and {recipe.donor} do not agree: {wrong}"
    if not recipe.whole and not _stack(donor):
        return "which of the tensors belong to layers is not plain"
    return folders


def _open(path: Path) -> Folder:
    with watched() as stamps:
        config, table = read_json(path / "config.json", "config.json"), open_tensors(path)
    files = tuple(p for c in table.containers for p in c.paths) + ((table.index,) if table.index else ())
    return Folder(path, config, table, files, stamps)


def _difference(recipe: Recipe, donor: Folder, other: Folder) -> str:
    """What tells two models apart by architecture, names or shapes; "" if nothing does."""
    if donor.config.get("architectures") != other.config.get("architectures"):
        return f"{other.config.get('architectures')} and {donor.config.get('architectures')}"
    ours, theirs = ({n: t.shape for n, t in f.tensors.items()} for f in (donor, other))
    if not recipe.whole:  # of layers, the numbers do not count
        ours, theirs = ({_of_any_layer(n): s for n, s in shapes.items()} for shapes in (ours, theirs))
    odd = sorted(ours.keys() ^ theirs.keys()) or sorted(n for n in ours if ours[n] != theirs[n])
    return some(odd)


def _of_any_layer(name: str) -> str:
    match = _NUMBERED.fullmatch(name)
    return f"{match[1]}*{match[3]}" if match else name


def _place(name: str) -> Place | None:
    match = _NUMBERED.fullmatch(name)
    return (match[1], int(match[2]), match[3]) if match else None


def _stack(folder: Folder) -> str:
    """What stands before the numbers of the layers; "" if several stacks, or none, have as many as the config says."""
    numbers: dict[str, set[int]] = {}
    for name in folder.tensors:
        if place := _place(name):
            numbers.setdefault(place[0], set()).add(place[1])
    found = [stack for stack, seen in numbers.items() if seen == set(range(folder.layers))]
    return found[0] if len(found) == 1 else ""


# ------------------------------------------------------------------------------------------- the tensors of the output


@dataclass(frozen=True)
class _Out:
    """A tensor of the output: its name, its slice, the place t (0 to 1), and its name in every source."""

    name: str
    part: OutputSlice
    t: float
    names: tuple[str, ...]


def _outputs(recipe: Recipe, folders: Folders) -> Iterator[_Out]:
    """Every tensor of the output.  What stands before the layers belongs to the first slice, the rest to the last."""
    donor, depths = folders[recipe.donor], {model: folder.layers for model, folder in folders.items()}
    stack = _stack(donor)
    for name in donor.tensors:
        place = _place(name)
        if not place or place[0] != stack:
            part = recipe.slices[0 if _FIRST.search(name) else -1]
            yield _Out(name, part, 0.0, (name,) * len(part.sources))
    for at, layer in enumerate(out_layers(recipe, depths) if stack else []):
        first = layer.slice.sources[0]
        numbers = [span(source, depths)[0] + layer.offset for source in layer.slice.sources]
        for name in folders[first.model].tensors:
            place = _place(name)
            if place and place[:2] == (stack, numbers[0]):
                names = tuple(f"{stack}{number}{place[2]}" for number in numbers)
                yield _Out(f"{stack}{at}{place[2]}", layer.slice, layer.t, names)


def _tensors(recipe: Recipe, folders: Folders, arithmetic: str, engine: Engine) -> dict[str, Lazy]:
    """The merged tensors.  Whole numbers have no mean: they must be the same in every model."""
    out: dict[str, Lazy] = {}
    for wanted in _outputs(recipe, folders):
        given = []
        for source, name in zip(wanted.part.sources, wanted.names, strict=True):
            if name not in (tensors := folders[source.model].tensors):
                raise LayoutError(f"{source.model} has no {name}, which {wanted.name} is made of")
            given.append(Given(source, name, tensors[name]))
        if any(g.tensor.dtype not in FLOATS for g in given):
            out[wanted.name] = Same([g.tensor for g in given], wanted.name, "such tensors are not merged")
        else:
            tensor = Tensor(wanted.name, wanted.part, wanted.t, False)
            out[wanted.name] = merged_tensor(recipe, tensor, given, arithmetic, engine, None)
    return out


def _config(recipe: Recipe, folders: Folders, tensors: Mapping[str, Lazy]) -> dict[str, Any]:
    """The donor's config, with the layers and the dtype of the merge."""
    donor, depths = folders[recipe.donor], {model: folder.layers for model, folder in folders.items()}
    config = donor.config
    if not recipe.whole:
        sources = [(layer.slice.sources[0], layer.offset) for layer in out_layers(recipe, depths)]
        own = {model: stated(folder.config, understood(folder.config)) for model, folder in folders.items()}
        config = fitted(own[recipe.donor], [(own[s.model], span(s, depths)[0] + offset) for s, offset in sources])
    dtype = main_dtype(tensors.values())
    return readable({**config, **{key: dtype for key in ("torch_dtype", "dtype") if key in config}})


# ------------------------------------------------------------------------------------------------ from folder to folder


@dataclass(frozen=True)
class Merge:
    """A merge that can be written while the context of `prepared` is open."""

    recipe: Recipe
    folders: Folders
    request: Soup
    files: tuple[OutputFile, ...]
    tensors: Mapping[str, Lazy]
    ledger: Ledger
    threads: int
    notes: tuple[str, ...]
    left: Mapping[str, str]

    @property
    def bytes_to_write(self) -> int:
        """What is told to `progress` in all: bytes written, and read back."""
        return sum(f.size for f in self.files) * (2 if self.request.verify else 1)

    def write(self, dst: Path, progress: stream.Progress | None = None) -> Report:
        """Write the merge, read it back, try whether transformers would load it.  Raises SurgeryError."""
        began, notes, seconds = time.monotonic(), list(self.notes), 0.0

        def close(written: stream.Written) -> list[OutputFile]:
            nonlocal seconds
            start = time.monotonic()
            if self.request.verify:
                _read_back(self.ledger, data_of(dst), self.request.memory, progress)
            for folder in self.folders.values():
                check_unchanged(folder.stamps)
            if told := check_loads(data_of(dst), self.folders[self.recipe.donor].path):
                notes.append(told)
            notes.extend(remarks(self.ledger, self.tensors))
            seconds = time.monotonic() - start
            record = {"surgery": surgery.__version__, "command": list(self.request.command), "output": {"format": "hf"},
                      "content": self.ledger.content_digest(), "notes": notes}  # fmt: skip
            return [text_file(PROVENANCE, json_text(record))]

        request = self.request
        job = {"surgery": surgery.__version__, "soup": repr(self.recipe), "arithmetic": request.arithmetic,
               "by": "name",
               "sources": [sorted(map(str, f.stamps.items())) for f in self.folders.values()]}  # fmt: skip
        done = stream.write(self.files, dst, max_memory=request.memory, job=job, ledger=self.ledger,
                            progress=progress or request.progress, force=request.force, durable=request.sync,
                            threads=self.threads, closing=close, compare=request.verify)  # fmt: skip
        return Report(
            source=str(self.recipe.donor), source_format="hf", output=shown(dst), output_format="hf", topology={},
            files=len(self.files) + 1, bytes=done.bytes, read_bytes=done.read_bytes,
            resumed_bytes=done.resumed_bytes, seconds=time.monotonic() - began, verify_seconds=seconds,
            peak_memory=done.peak, max_memory=request.memory, source_digest=None,
            content_digest=self.ledger.content_digest(), verified=request.verify, dropped=self.left,
            notes=(*notes, *done.notes),
        )  # fmt: skip


@contextmanager
def prepared(recipe: Recipe, folders: Folders, request: Soup) -> Iterator[Merge]:
    """The merge, planned; it can be written while the context is open.  Raises SurgeryError."""
    engine = Engine(request.threads or cores(), request.memory, compiled_loops())
    with scratch("soup") as temporary:
        try:
            ledger = Ledger(numbers=True)
            merged = settled(_tensors(recipe, folders, request.arithmetic, engine), ledger)
            stored = {name: Stored(ledger.tap(name, tensor)) for name, tensor in merged.items()}
            if engine.loops:
                ledger.row_sums = engine.loops.row_sums
            donor = folders[recipe.donor]
            small, notes, left = _beside(recipe, folders, request, temporary)
            limit = shard_size(str((request.options or {}).get("shard_size", "5GB")))
            files = [text_file("config.json", json_text(_config(recipe, folders, merged))), *small]
            files += [text_file(RECORD, json_text(_record(recipe, folders, request))), *weight_files(stored, limit)]
            said = [f"merged by the names of its tensors, as {donor.config.get('model_type')} is stored", *recipe.notes]
            said += idle_filters(recipe, merged)
            yield Merge(recipe, folders, request, tuple(files), merged, ledger, engine.threads, (*said, *notes), left)
        finally:
            engine.close()


def _beside(
    recipe: Recipe, folders: Folders, request: Soup, folder: Path
) -> tuple[list[OutputFile], list[str], dict[str, str]]:
    """The donor's small files, its tokenizer or the one that was asked for, notes, and what is left out."""
    donor, notes = folders[recipe.donor], []
    own = tokenizer.find(donor.path)
    found = tokenizer.find(Path(request.tokenizer)) if request.tokenizer else own
    if request.tokenizer and found is None:
        raise UsageError(f"--tokenizer {request.tokenizer}: no tokenizer was found there")
    if recipe.chat_template:
        models = [tokenizer.find(f.path) for f in folders.values()]
        found, note = with_template(found, recipe.chat_template, models, folder / "chat")
        notes.append(note)
    tokens = tokenizer.carry(found) if found else None
    read = {*donor.files, donor.path / "config.json", *(own.files.values() if own else ())}
    rest = beside(donor.path, read, (Rule(_SMALL.pattern, verdict=CARRIED),))
    files = {file.name: file for file in (tokens.files if tokens else ())}
    files |= {name: copied_file(name, path) for name, path in rest.carried.items() if name not in files}
    return [*files.values()], [*notes, *(tokens.notes if tokens else ())], rest.left


def _read_back(ledger: Ledger, written: Path, memory: int, progress: stream.Progress | None) -> None:
    again = Ledger()
    stream.read_through(dict(open_tensors(written)), again, memory, progress)
    ours = {n for n in ledger.parts if not n.startswith(SOURCE)}
    wrong = [n for n in again.parts.keys() | ours if n not in again.parts or n not in ours
             or again.fingerprint(n) != ledger.fingerprint(n)]  # fmt: skip
    if wrong:
        raise Spoilt(f"{len(wrong)} tensors read back differently from what was written: {some(sorted(wrong))}",
                     file=written, hint="the disk or the memory is faulty; the output was not published")  # fmt: skip


def _record(recipe: Recipe, folders: Folders, request: Soup) -> dict[str, Any]:
    models = {str(m): {"path": shown(f.path), "files": {p.name: size_of(p) for p in f.files}}
              for m, f in folders.items()}  # fmt: skip
    return {"method": recipe.method, "donor": str(recipe.donor), "models": models, "seed": recipe.seed,
            "arithmetic": request.arithmetic, "config": recipe.text}  # fmt: skip
