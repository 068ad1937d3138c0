"""A merge from its YAML to a checkpoint: open the models, assemble the merge, plan and execute as any conversion.

    report = soup("merge_configs/three-seeds.yaml", "merged")                        # Hugging Face
    report = soup(recipe, "merged", to="meta", topology=Topology(tp=2))              # a Recipe or a mapping, too

The output is written and read back by `conversion.execute`: whole or not at all, resumable, with its digest.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.containers.output import text_file
from surgery.conversion.convert import Plan, Report, default_memory, execute, plan_for
from surgery.errors import OutputError, UsageError, some
from surgery.formats.base import Checkpoint, Options
from surgery.formats.registry import FORMATS
from surgery.formats.table import ONE_RANK, Topology
from surgery.merging import layers
from surgery.merging.engine.pool import Engine, compiled_loops
from surgery.merging.mergekit import by_mergekit, reason_for_mergekit
from surgery.merging.padding import trimmed
from surgery.merging.reader import Reference
from surgery.merging.recipe import Recipe, parse_recipe, read_recipe
from surgery.merging.references import open_all
from surgery.writing import stream
from surgery.writing.staging import check_free

ARITHMETIC = ("fp32", "mergekit")
RECORD = "soup.json"


@dataclass(frozen=True)
class Settings:
    """How to merge; every field is a flag of `surgery soup`.

    arithmetic: "fp32" rounds once, at the end; "mergekit" works in the `dtype` of the YAML (or that of the models),
    as mergekit does, rounding every intermediate result.
    """

    to: str = "hf"
    topology: Topology = ONE_RANK
    options: Options | None = None
    max_memory: int | None = None
    threads: int | None = None
    arithmetic: str = "fp32"


def read(config: str | os.PathLike[str] | Mapping[str, Any] | Recipe) -> Recipe:
    """A recipe from a YAML file, from what its YAML means, or as it is."""
    if isinstance(config, Recipe):
        return config
    return parse_recipe(dict(config)) if isinstance(config, Mapping) else read_recipe(config)


@contextmanager
def prepared(recipe: Recipe, settings: Settings) -> Iterator[Plan]:
    """The plan of a merge; it can be executed while the context is open.  Raises SurgeryError."""
    if settings.arithmetic not in ARITHMETIC:
        raise UsageError(f"--arithmetic {settings.arithmetic}: choose {' or '.join(ARITHMETIC)}")
    target = FORMATS.get(settings.to)
    if target is None:
        raise UsageError(f"there is no format {settings.to!r}", hint=f"known formats: {', '.join(FORMATS)}")
    given = dict(settings.options or {})
    writing = {k: v for k, v in given.items() if k in target.option_names("write")}
    reading = {k: v for k, v in given.items() if k not in writing or any(
        k in f.option_names("read") for f in FORMATS.values())}  # fmt: skip
    if unknown := [k for k in reading if not any(k in f.option_names("read") for f in FORMATS.values())]:
        raise UsageError(f"no format has an option {', '.join(unknown)}", hint="`surgery formats` lists them all")
    opened = open_all(recipe.models(), reading)
    memory = settings.max_memory or default_memory()
    engine = Engine(settings.threads or stream.cores(), memory, compiled_loops())
    with tempfile.TemporaryDirectory(prefix="surgery-soup-") as scratch:
        try:
            merged = derive(recipe, opened, settings.arithmetic, engine, Path(scratch))
            plan = plan_for(
                merged, to=settings.to, topology=settings.topology, options=writing, max_memory=memory,
                settings={"soup": repr(recipe), "arithmetic": settings.arithmetic, "compiled": bool(engine.loops),
                          "derived": True},
            )  # fmt: skip
            if engine.loops:
                plan.ledger.row_sums = engine.loops.row_sums
            record = text_file(RECORD, _record(recipe, opened, settings))
            output = replace(plan.output, files=(*plan.output.files, record))
            yield replace(plan, output=output, threads=engine.threads)
        finally:
            engine.close()


def derive(
    recipe: Recipe, opened: Mapping[Reference, Checkpoint], arithmetic: str, engine: Engine, scratch: Path
) -> Checkpoint:
    """The merge as a lazy checkpoint: the donor's config and tokenizer, merged parts.  `scratch` is for a tokenizer."""
    from surgery.merging.tokens import with_template
    from surgery.merging.vocabulary import Alignment

    notes: list[str] = []
    if recipe.vocabulary is None:
        opened, told = trimmed(opened)
        notes += told
    donor = opened[recipe.donor]
    if recipe.align:
        from surgery.merging.align_experts import aligned

        opened, told = aligned(recipe, opened)
        notes += told
    alignment = Alignment.build(recipe, opened, scratch) if recipe.vocabulary else None
    spec, parts, told = layers.assemble(
        recipe,
        opened,
        arithmetic,
        engine,
        alignment.apply if alignment else None,
        alignment.rows if alignment else None,
    )
    notes += told
    why = "the base model" if recipe.base else "the first model named"
    what = "config" if alignment else "config and tokenizer"
    notes.insert(0, f"{what} of {recipe.donor}, {why}")
    found, facts, config = donor.tokenizer, dict(donor.facts), dict(donor.config)
    if alignment:
        notes += alignment.notes
        found, ids = alignment.tokenizer, alignment.ids(recipe.donor, facts)
        facts, config = ({k: v for k, v in d.items() if not k.endswith("_token_id")} | ids for d in (facts, config))
    if recipe.chat_template:
        found, note = with_template(
            found, recipe.chat_template, [c.tokenizer for c in opened.values()], scratch / "chat"
        )
        notes.append(note)
    if not engine.loops:
        notes.append("numba is not there, so it takes several times as long: pip install 'checkpoint-surgery[merge]'")
    for model, checkpoint in opened.items():
        notes += [f"{model}: {note}" for note in checkpoint.notes]
    return replace(
        donor,
        spec=spec,
        parts=parts,
        config=config,
        facts=facts,
        tokenizer=found,
        files=tuple(dict.fromkeys(f for c in opened.values() for f in c.files)),
        ignored={k: v for c in opened.values() for k, v in c.ignored.items()},
        notes=tuple(dict.fromkeys(notes)),
    )


def soup(
    config: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    dst: str | os.PathLike[str],
    *,
    to: str = "hf",
    topology: Topology = ONE_RANK,
    options: Options | None = None,
    max_memory: int | None = None,
    threads: int | None = None,
    arithmetic: str = "fp32",
    force: bool = False,
    verify: bool = True,
    sync: bool = True,
    command: Sequence[str] = (),
    progress: stream.Progress | None = None,
) -> Report:
    """Merge models as mergekit's YAML says, from any formats into any format.

    `config` is a YAML file, a mapping or a Recipe; `dst` appears whole or not at all.  The same config, models and
    seed give the same bytes whatever the memory and the threads.  Raises SurgeryError.
    """
    recipe = read(config)
    settings = Settings(to, topology, options, max_memory, threads, arithmetic)
    check_free(Path(dst), force)
    if why := reason_for_mergekit(recipe, settings.to):
        return by_mergekit(recipe, Path(dst), why, force=force, command=command)
    with prepared(recipe, settings) as plan:
        return carry_out(recipe, plan, dst, force=force, verify=verify, sync=sync, command=command, progress=progress)


def carry_out(
    recipe: Recipe,
    plan: Plan,
    dst: str | os.PathLike[str],
    *,
    force: bool = False,
    verify: bool = True,
    sync: bool = True,
    command: Sequence[str] = (),
    progress: stream.Progress | None = None,
) -> Report:
    """Write what `prepared` planned, while its context is open."""
    refuse_overlap(plan.source, Path(dst))
    report = execute(plan, dst, force=force, verify=verify, sync=sync, command=command, progress=progress)
    return replace(report, source=summary(recipe))


def summary(recipe: Recipe) -> str:
    """The merge in a few words: its method and its models."""
    return f"{recipe.method} of {some(map(str, recipe.models()), 4)}"


def refuse_overlap(source: Checkpoint, dst: Path) -> None:
    """Raise OutputError if the output would lie in a model that is merged, or the other way round."""
    at = dst.resolve()
    for folder in {f.resolve().parent for f in source.files}:
        if at == folder or at in folder.parents or folder in at.parents:
            raise OutputError(f"and the model {folder} lie within each other", file=dst, hint="write beside it")


def _record(recipe: Recipe, opened: Mapping[Reference, Checkpoint], settings: Settings) -> bytes:
    """soup.json: what was merged and how."""
    given: dict[Reference, list[object]] = {}
    for source in (source for s in recipe.slices for source in s.sources):
        given.setdefault(source.model, []).append({"layers": source.layers, **source.settings})
    models = {
        str(m): {
            "path": str(c.path), "format": c.format, "parameters": given.get(m, []),
            "files": {p.name: p.stat().st_size for p in c.files},
        }
        for m, c in opened.items()
    }  # fmt: skip
    record = {"method": recipe.method, "donor": str(recipe.donor), "models": models, "seed": recipe.seed,
              "arithmetic": settings.arithmetic, "config": recipe.text}  # fmt: skip
    return (json.dumps(record, indent=2) + "\n").encode()
