"""A merge from its YAML to a checkpoint: open the models, assemble the merge, plan and execute as any conversion.

    report = soup("merge_configs/three-seeds.yaml", "merged")                        # Hugging Face
    report = soup(recipe, "merged", to="meta", topology=Topology(tp=2))              # a Recipe or a mapping, too

The output is written and read back by `conversion.execute`: whole or not at all, resumable, with its digest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from surgery.containers.output import text_file
from surgery.containers.text import json_text
from surgery.conversion.convert import carried_out, plan_for, request_of_share, whole, write_share
from surgery.conversion.report import Plan, Report, Share
from surgery.errors import OutputError, UsageError, shown, some
from surgery.formats.base import Checkpoint
from surgery.formats.registry import by_side, named, recognise
from surgery.merging import by_name
from surgery.merging.derive import derive
from surgery.merging.engine.pending import settled
from surgery.merging.engine.pool import Engine, compiled_loops
from surgery.merging.mergekit import by_mergekit
from surgery.merging.recipe import Recipe, parse_recipe, read_recipe
from surgery.merging.references import Opened, model_folder, open_all
from surgery.merging.request import Soup
from surgery.merging.way import MERGEKIT, NAMES, TABLE, way
from surgery.running.expected import check_loads
from surgery.settings import taking
from surgery.storage.outgoing import outgoing
from surgery.tensors.files import size_of
from surgery.tensors.fingerprint import Ledger
from surgery.writing import stream
from surgery.writing.ahead import cores
from surgery.writing.scratch import scratch
from surgery.writing.shards import Shard
from surgery.writing.staging import check_free

RECORD = "soup.json"
Bar = Callable[[int], AbstractContextManager[stream.Progress | None]]
Config = str | os.PathLike[str] | Mapping[str, Any] | Recipe


@taking(Soup)
def soup(config: Config, dst: str | os.PathLike[str], request: Soup) -> Report:
    """Merge models as mergekit's YAML says, from any formats into any format.

    surgery.soup("merge_configs/three-seeds.yaml", "merged", to="meta")

    `config` is a YAML file, a mapping or a Recipe; `dst` appears whole or not at all.  The same config, models and
    seed give the same bytes whatever the memory and the threads.  Raises SurgeryError.
    """
    with outgoing(dst, request) as place:
        check_free(place, request.force)
        return whole(merge(read(config), place, request))


def merge(
    recipe: Recipe, dst: str | os.PathLike[str], request: Soup, bar: Bar = lambda total: nullcontext()
) -> Report | Share:
    """The same of a recipe; `bar` is told how many bytes there are, and gives what is called with those done."""
    chosen = way(recipe, request.to)
    if chosen.kind != TABLE and (request.shard or request.workers > 1):
        raise UsageError(f"one process writes such a merge: {chosen.why}", hint="leave out --workers and --shard")
    if chosen.kind == MERGEKIT:
        return by_mergekit(recipe, Path(dst), chosen.why, request)
    if chosen.kind == NAMES:
        with by_name.prepared(recipe, chosen.folders, request) as job, bar(job.bytes_to_write) as advance:
            return job.write(Path(dst), advance)
    with prepared(recipe, request) as plan, bar(plan.bytes_to_write) as advance:
        return carry_out(recipe, plan, dst, request, advance)


def read(config: Config) -> Recipe:
    """A recipe from a YAML file, from what its YAML means, or as it is."""
    if isinstance(config, Recipe):
        return config
    return parse_recipe(dict(config)) if isinstance(config, Mapping) else read_recipe(config)


@contextmanager
def prepared(recipe: Recipe, request: Soup) -> Iterator[Plan]:
    """The plan of a merge; it can be executed while the context is open.  Raises SurgeryError."""
    target, formats = named(request.to), [recognise(model_folder(model)) for model in recipe.models()]
    reading, writing = by_side(request.options or {}, formats, target)
    opened = open_all(recipe.models(), reading)
    engine = Engine(request.threads or cores(), request.memory, compiled_loops())
    with scratch("soup") as temporary:
        try:
            merged = derive(recipe, opened, request.arithmetic, engine, temporary)
            job = {"soup": repr(recipe), "arithmetic": request.arithmetic, "compiled": bool(engine.loops)}
            ledger = Ledger(numbers=True)
            merged = replace(merged, parts=settled(merged.parts, ledger))
            plan = plan_for(merged, request, options=writing, job=job, ledger=ledger)
            if engine.loops:
                plan.ledger.row_sums = engine.loops.row_sums
            record = text_file(RECORD, _record(recipe, opened, request))
            output = replace(plan.output, files=(*plan.output.files, record))
            prove = _loads if target.name == "hf" and recipe.reshapes else None
            yield replace(plan, output=output, threads=engine.threads, prove=prove)
        finally:
            engine.close()


def carry_out(
    recipe: Recipe, plan: Plan, dst: str | os.PathLike[str], request: Soup, progress: stream.Progress | None = None
) -> Report | Share:
    """Write what `prepared` planned, while its context is open, or one share of it."""
    refuse_overlap(plan.source, Path(dst))
    threads = max(1, (request.threads or cores()) // request.workers)
    task = partial(_share, recipe, os.fspath(dst), replace(request_of_share(request), threads=threads))
    done = carried_out(plan, dst, request, task, progress)
    return done if isinstance(done, Share) else replace(done, source=summary(recipe))


def _share(recipe: Recipe, dst: str, request: Soup, shard: Shard, progress: stream.Progress) -> None:
    """What each of several processes does."""
    with prepared(recipe, request) as plan:
        write_share(plan, dst, shard, progress)


def _loads(written: Checkpoint) -> dict[str, Any]:
    """Try whether transformers would load the output, before it appears."""
    return {"note": note} if (note := check_loads(written.path)) else {}


def summary(recipe: Recipe) -> str:
    """The merge in a few words: its method and its models."""
    return f"{recipe.method} of {some(map(str, recipe.models()), 4)}"


def refuse_overlap(source: Checkpoint, dst: Path) -> None:
    """Raise OutputError if the output would lie in a model that is merged, or the other way round."""
    at = dst.resolve()
    for folder in {f.resolve().parent for f in source.files}:
        if at == folder or at in folder.parents or folder in at.parents:
            raise OutputError(f"and the model {folder} lie within each other", file=dst, hint="write beside it")


def _record(recipe: Recipe, opened: Opened, request: Soup) -> bytes:
    """soup.json: what was merged and how."""
    given: dict[object, list[object]] = {}
    for source in (source for s in recipe.slices for source in s.sources):
        given.setdefault(source.model, []).append({"layers": source.layers, **source.settings})
    models = {
        str(m): {
            "path": shown(c.path), "format": c.format, "parameters": given.get(m, []),
            "files": {p.name: size_of(p) for p in c.files},
        }
        for m, c in opened.items()
    }  # fmt: skip
    record = {"method": recipe.method, "donor": str(recipe.donor), "models": models, "seed": recipe.seed,
              "arithmetic": request.arithmetic, "config": recipe.text}  # fmt: skip
    return json_text(record)
