"""What a batch holds, of any run whose order is known.

batches = open_rows("plan")                  # a plan of ours
batches = open_rows("olmo-run")              # config.yaml and global_indices.npy of OLMo
batches = open_rows("megatron.yaml")         # or the ...-description.txt of Megatron's cache
batches = open_rows("batches.npz")           # a record
held = contents(batches, step=500, rows=range(4), decode=vocabulary.tokenizer.decode)
held["rows"][0]["passages"][0]["document"]   # 1729
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from surgery.containers.text import read_yaml
from surgery.data.plans.batches import Batches
from surgery.data.plans.plan import open_plan
from surgery.data.plans.plan_file import FILES, NAME
from surgery.data.rows import IGNORE, RowSource
from surgery.data.trainers import olmo_batches
from surgery.data.trainers.megatron_cache import DESCRIPTION, open_cache
from surgery.data.trainers.megatron_run import open_megatron
from surgery.data.trainers.recorded import RecordedBatches
from surgery.errors import ConfigError, UsageError, shown, some
from surgery.storage.copies import here

# what of a folder is looked at, as patterns
KNOWN = (*FILES, f"*/{NAME}", olmo_batches.CONFIG, *olmo_batches.ORDER, f"*{DESCRIPTION}")
Decode = Callable[[list[int]], str]


def open_rows(
    path: str | os.PathLike[str],
    rows_per_step: int | None = None,
    *,
    root: str | os.PathLike[str] | None = None,
    pad_id: int | None = None,
) -> RowSource:
    """The batches that a path describes.  Raises ConfigError if it describes none.

    rows_per_step  of the global batch, in place of what the run says
    root           where the data of a plan lie now      pad_id  of the tokenizer of a Megatron run
    """
    path = here(path, only=KNOWN)
    if (path / NAME).is_file():
        return Batches(open_plan(path, root=root), rows_per_step)
    if (path / olmo_batches.CONFIG).is_file():
        return olmo_batches.open_olmo(path, rows_per_step)
    if path.is_dir():
        found = sorted(p.name for p in path.glob("*" + DESCRIPTION)) + [p.parent.name for p in path.glob(f"*/{NAME}")]
        hint = f"name one of {some(found)}" if found else f"a plan has {NAME}, a run of OLMo {olmo_batches.CONFIG}"
        raise ConfigError("is no plan and no run that is known", file=path, hint=hint)
    if path.name.endswith(DESCRIPTION):
        return open_cache(path, rows_per_step, pad_id)
    if path.suffix == ".npz":
        return RecordedBatches(path)
    return _from_yaml(path, rows_per_step, pad_id)


def _from_yaml(path: Path, rows_per_step: int | None, pad_id: int | None) -> RowSource:
    value = read_yaml(path, "run")
    keys = value if isinstance(value, dict) else {}
    if "megatron" in keys:
        return open_megatron(path, rows_per_step, pad_id)
    if "data" in keys and "model" in keys:
        return olmo_batches.open_olmo(path, rows_per_step)
    hint = "make a plan of it first: surgery data plan" if "sources" in keys else None
    raise ConfigError("describes no run: neither `megatron` nor `data` and `model` are in it", file=path, hint=hint)


def contents(
    batches: RowSource,
    step: int,
    rows: Container[int] | None = None,
    source: str | None = None,
    decode: Decode | None = None,
    most: int | None = None,
) -> dict[str, Any]:
    """A step as plain data: how many rows each source gives, and of each row its tokens, labels and where they lie.

    rows    which of the step's, from 0; None: all      source  only rows of this one
    most    no more rows than this                      decode  ids -> text, of each passage
    """
    if source is not None and source not in batches.sources:
        raise UsageError(f"there is no source {source!r}", hint=f"sources: {', '.join(batches.sources)}")
    held = batches.rows(step)
    names = [batches.sources[s] for s in held.source]
    chosen = [row for row in range(len(held)) if rows is None or row in rows]
    if not chosen:
        raise UsageError("none of the rows that are asked for is in the step", hint=f"it has 0 to {len(held) - 1}")
    wanted = [row for row in chosen if source in (None, names[row])][:most]
    return {
        "step": step,
        "steps": len(batches),
        "rows_per_step": len(held),
        "sequence_length": batches.sequence_length,
        "learnt": held.learnt,
        "sources": dict(Counter(names)),
        "rows": [
            {
                "row": row,
                "source": names[row],
                "instance": int(held.instance[row]),
                "learnt": int((held.labels[row] != IGNORE).sum()),
                "passages": _passages(batches, held.tokens[row].tolist(), held.source[row], held.instance[row], decode),
                "tokens": held.tokens[row].tolist(),
                "labels": held.labels[row].tolist(),
                "positions": None if held.positions is None else held.positions[row].tolist(),
            }
            for row in wanted
        ],
    }


def _passages(batches: RowSource, ids: list[int], source: int, instance: int, decode: Decode | None) -> list[Any]:
    found, at = [], 0
    for passage in batches.passages(int(source), int(instance)):
        inside = ids[at : at + passage.stop - passage.start]
        at += len(inside)
        text = {} if decode is None else {"text": decode(inside)}
        where = {
            "file": shown(passage.path),
            "document": passage.document,
            "start": passage.start,
            "stop": passage.stop,
        }
        found.append({**where, "tokens": len(inside), **text})
    return found
