"""What only mergekit can do is done by mergekit, as a library, and said so.

    report = by_mergekit(recipe, Path("merged"), "the modules ... are known to mergekit only", Soup())

`way` says which jobs these are.  mergekit merges the whole job, from Hugging Face folders to a Hugging Face folder, in
memory of its own.  The order of the models is that of the file, so that the donor is the same as for a merge by
surgery.  mergekit is known to lose tensors: what it wrote is compared with the donor, name by name and as transformers
loads it, before the output appears.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import surgery
from surgery.containers import open_tensors
from surgery.containers.output import OutputFile, copied_file, text_file
from surgery.containers.text import json_text, read_json
from surgery.conversion.numbers import remarks
from surgery.conversion.report import Report
from surgery.errors import ConfigError, LayoutError, UsageError, shown, some
from surgery.formats.base import PROVENANCE
from surgery.merging.recipe import Recipe
from surgery.merging.references import locate, model_folder
from surgery.merging.request import Soup
from surgery.running.expected import check_loads, readable
from surgery.tensors.files import check_unchanged
from surgery.tensors.fingerprint import Ledger
from surgery.tensors.stamp import Stamp
from surgery.writing import stream
from surgery.writing.scratch import scratch


def by_mergekit(recipe: Recipe, dst: Path, why: str, request: Soup) -> Report:
    """Let mergekit do the whole merge.  Raises ConfigError with what mergekit says if it refuses."""
    if request.tokenizer is not None:
        raise UsageError(f"mergekit does this merge, and takes no --tokenizer: {why}",
                         hint="tokenizer: in the YAML, or surgery convert afterwards")  # fmt: skip
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    class Ordered(MergeConfiguration):  # type: ignore[misc]
        def referenced_models(self) -> list[Any]:
            found = {str(m): m for m in super().referenced_models()}
            return [found[str(m)] for m in recipe.models() if str(m) in found]

    began, text, stamps = time.monotonic(), recipe.text, _stamps(recipe)
    beside = dst.absolute().parent
    donor = model_folder(recipe.donor)
    with scratch("mergekit", beside) as temporary:
        out = temporary / "out"
        options = MergeOptions(random_seed=recipe.seed, quiet=True, lora_merge_cache=str(temporary / "lora"))
        LoaderCache.loaders.clear()  # what earlier merges of this process opened, by name
        try:
            run_merge(Ordered.model_validate(yaml.safe_load(text)), str(out), options, config_source=text)
        except Exception as error:
            if "--allow-crimes" in str(error):  # a flag of mergekit's that lets it do what nobody can mean
                raise ConfigError("the models are of different architectures, whose tensors mean other things",
                                  hint=why) from error  # fmt: skip
            raise ConfigError(f"mergekit could not do the merge either: {type(error).__name__}: {error}",
                              hint=why) from error  # fmt: skip
        check_unchanged(stamps)
        notes = [f"merged by mergekit, not by surgery, and in memory of its own: {why}", *recipe.notes]
        notes += [*_compared(out, donor), *_odd(out, request.memory)]
        _spelled(out / "config.json")
        files = [*_copies(out), *_records(recipe, request, notes)]
        done = stream.write(
            files, dst, max_memory=request.memory, job={"mergekit": os.urandom(8).hex()}, force=request.force
        )
    return Report(
        source=str(recipe.donor), source_format="hf", output=shown(dst), output_format="hf", topology={},
        files=len(files), bytes=done.bytes, read_bytes=done.read_bytes, resumed_bytes=0,
        seconds=time.monotonic() - began, verify_seconds=0.0, peak_memory=done.peak, max_memory=request.memory,
        source_digest=None, content_digest="", verified=True, notes=tuple(notes),
    )  # fmt: skip


def _stamps(recipe: Recipe) -> dict[str, Stamp]:
    """Of all files of the models and their adapters, as they are now: mergekit opens them by itself."""
    folders = [model_folder(model) for model in recipe.models()]
    folders += [locate(model.lora) for model in recipe.models() if model.lora]
    return {str(path): Stamp.of(path.stat()) for folder in folders for path in folder.iterdir() if path.is_file()}


def _odd(out: Path, memory: int) -> list[str]:
    """Notes on values that are no numbers."""
    ledger, tensors = Ledger(numbers=True), dict(open_tensors(out))
    stream.read_through(tensors, ledger, memory)
    return remarks(ledger, tensors)


def _spelled(file: Path) -> None:
    """The config for older programs too."""
    config = read_json(file, file.name)
    if isinstance(config, dict):
        file.write_bytes(json_text(readable(config)))


def _copies(out: Path) -> list[OutputFile]:
    names = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    return [copied_file(name, out / name) for name in names]


def _records(recipe: Recipe, request: Soup, notes: Sequence[str]) -> list[OutputFile]:
    """surgery.json and soup.json."""
    record = {
        "surgery": surgery.__version__,
        "command": list(request.command),
        "output": {"format": "hf"},
        "notes": list(notes),
    }
    merge = {"method": recipe.method, "donor": str(recipe.donor), "models": [str(m) for m in recipe.models()],
             "seed": recipe.seed, "by": "mergekit", "config": recipe.text}  # fmt: skip
    return [text_file(PROVENANCE, json_text(record)), text_file("soup.json", json_text(merge))]


def _compared(out: Path, donor: Path) -> list[str]:
    """Notes on what tells the output from the donor.  Raises LayoutError if tensors were lost.

    Layers may be more or fewer, and experts stacked: of both, names without numbers are compared, and what transformers
    would miss.
    """
    ours, theirs = ({_kind(name) for name in open_tensors(folder)} for folder in (out, donor))
    told = check_loads(out, donor)
    lost = sorted(theirs - ours)
    if lost and told:
        raise LayoutError(f"mergekit lost tensors that {donor} has: {some(lost)}", file=out,
                          hint="the output was not published; it is a fault of mergekit")  # fmt: skip
    return [told] if told else []


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)
