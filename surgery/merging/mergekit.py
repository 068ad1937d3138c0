"""What only mergekit can do is done by mergekit, as a library, and said so.

    if why := reason_for_mergekit(recipe, "hf"):
        report = by_mergekit(recipe, Path("merged"), why, Soup())

Architectures that surgery does not know and models of several modules: mergekit merges the whole job, from Hugging
Face folders to a Hugging Face folder.  The order of the models is that of the file, so that the donor is the same as
for a merge by surgery, and the output appears under its name when it is complete.
"""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path
from typing import Any

from surgery.containers.output import copied_file, text_file
from surgery.containers.text import json_text, read_json
from surgery.conversion.report import Report, version
from surgery.errors import ConfigError, UsageError, show
from surgery.formats.base import PROVENANCE
from surgery.formats.hf.families import FAMILIES
from surgery.merging.recipe import Recipe
from surgery.merging.references import model_folder
from surgery.merging.request import Soup
from surgery.writing.scratch import scratch


def reason_for_mergekit(recipe: Recipe, to: str) -> str:
    """Why a job is mergekit's alone; "" if it is not.  Raises UsageError if mergekit cannot do it either."""
    why = ""
    if recipe.modules not in ((), ("default",)):
        why = f"the modules {', '.join(recipe.modules)} are known to mergekit only"
    for model in recipe.models():
        config = model_folder(model) / "config.json"
        if not why and config.is_file():
            kind = read_json(config, "config.json").get("model_type")
            if kind not in FAMILIES:
                why = f"{model} is a {show(kind)}, which mergekit may know and surgery does not"
    if not why:
        return ""
    if to != "hf":
        raise UsageError(f"{why}, and mergekit writes Hugging Face folders only", hint="leave out --to")
    if recipe.align:
        raise ConfigError(f"align is an option of surgery, but {why}")
    if importlib.util.find_spec("mergekit") is None:
        raise UsageError(f"{why}, and mergekit is not installed", hint="pip install 'checkpoint-surgery[merge]'")
    return why


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

    from surgery.writing import stream

    class Ordered(MergeConfiguration):
        def referenced_models(self) -> list[Any]:
            found = {str(m): m for m in super().referenced_models()}
            return [found[str(m)] for m in recipe.models() if str(m) in found]

    began, text = time.monotonic(), recipe.text
    beside = dst.absolute().parent
    with scratch("mergekit", beside) as temporary:
        out = temporary / "out"
        options = MergeOptions(random_seed=recipe.seed, quiet=True, lora_merge_cache=str(temporary / "lora"))
        LoaderCache.loaders.clear()  # what earlier merges of this process opened, by name
        try:
            run_merge(Ordered.model_validate(yaml.safe_load(text)), str(out), options, config_source=text)
        except Exception as error:
            raise ConfigError(f"mergekit could not do the merge either: {type(error).__name__}: {error}",
                              hint=why) from error  # fmt: skip
        names = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
        files = [copied_file(name, out / name) for name in names]
        notes = [f"merged by mergekit, not by surgery: {why}", *recipe.notes]
        record = {"surgery": version(), "command": list(request.command), "output": {"format": "hf"}, "notes": notes}
        files.append(text_file(PROVENANCE, json_text(record)))
        done = stream.write(
            files, dst, max_memory=request.memory, job={"mergekit": os.urandom(8).hex()}, force=request.force
        )
    return Report(
        source=str(recipe.donor), source_format="hf", output=str(dst), output_format="hf", topology={},
        files=len(files), bytes=done.bytes, read_bytes=done.read_bytes, resumed_bytes=0,
        seconds=time.monotonic() - began, verify_seconds=0.0, peak_memory=done.peak, max_memory=request.memory,
        source_digest=None, content_digest="", verified=False, notes=tuple(notes),
    )  # fmt: skip
