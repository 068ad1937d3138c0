"""Folders of Hugging Face `datasets` (`save_to_disk`) whose rows are token ids, mapped and not copied.

    files = open_dataset("tokenized/train")         # a TokenFile for each batch of rows; a row is a document

The column `input_ids` holds the ids.  `labels` must be the ids themselves or -100 (not learnt), which makes the label
mask; a column of zeros and ones is taken as the mask if it is named.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from surgery.containers.text import read_json
from surgery.data.extra import needs
from surgery.data.files.documents import EndBounds
from surgery.data.files.mapped import Array, Held
from surgery.data.files.tokens import TokenFile
from surgery.errors import ConfigError, FileError, show, some
from surgery.tensors.files import File, plain_name

IDS, LABELS = "input_ids", "labels"


DATASET = ("state.json", "dataset_dict.json")  # in what `Dataset.save_to_disk` and `DatasetDict.save_to_disk` write


def is_dataset(path: Path) -> bool:
    """Whether a folder is one of `datasets`."""
    return any((path / name).is_file() for name in DATASET)


def open_dataset(path: str | os.PathLike[str], mask: str | None = None) -> list[TokenFile]:
    """The rows of a folder.  `mask`: the column that says which tokens are learnt.

    Raises FileError if a file is broken or `labels` are other ids than `input_ids`, ConfigError if a column is missing.
    """
    path = Path(path)
    if (path / "dataset_dict.json").is_file():
        splits = read_json(path / "dataset_dict.json", "dataset").get("splits", [])
        hint = f"name one: {some(f'{path.name}/{s}' for s in splits)}"
        raise ConfigError("holds several splits", file=path, hint=hint)
    state = read_json(path / "state.json", "dataset")
    if state.get("_indices_data_files"):
        raise FileError("is a selection of rows of another table", file=path, hint="save it with flatten_indices()")
    try:
        names = [plain_name(entry["filename"], "state.json", path) for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise FileError("does not list its files", file=path / "state.json") from None
    return [part for name in names for part in _open(path / name, mask)]


def _open(path: Path, mask: str | None) -> list[TokenFile]:
    needs("pyarrow", "reading folders of datasets")
    import pyarrow as pa

    file = File(path)
    try:
        table = pa.ipc.open_stream(pa.memory_map(file.path)).read_all()
        batches = table.to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise FileError(f"is no readable Arrow file: {show(str(error))}", file=path) from None
    return [_batch(path, batch, mask) for batch in batches]


def _batch(path: Path, batch: Any, mask: str | None) -> TokenFile:
    ids, ends = _lists(path, batch, IDS)
    kept: Array | None = None
    if mask is not None:
        kept, mask_ends = _lists(path, batch, mask)
    elif LABELS in batch.schema.names:
        labels, mask_ends = _lists(path, batch, LABELS)
        kept = labels != -100
        if labels.shape == ids.shape and (labels[kept] != ids[kept]).any():
            hint = f"labels must be the ids themselves, or -100; drop the column {LABELS}"
            raise FileError(f"{LABELS} are other ids than {IDS}", file=path, hint=hint)
    if kept is not None and not np.array_equal(ends, mask_ends):
        raise FileError(f"the rows of {IDS} and of {mask or LABELS} differ in length", file=path)
    held = None if kept is None else Held(kept.view(np.uint8) if kept.dtype == bool else kept)
    return TokenFile(path, "datasets", Held(ids), EndBounds(Held(ends)), held, (path,))


def _lists(path: Path, batch: Any, name: str) -> tuple[Array, Array]:
    """The values of a column of lists, one after the other, and the ends of the rows."""
    import pyarrow as pa

    if name not in batch.schema.names:
        what = f"has no column {show(name)}; its columns are {some(batch.schema.names)}"
        raise ConfigError(what, file=path, hint="tokenize text first: surgery data tokenize")
    column = batch.column(batch.schema.names.index(name))
    if not isinstance(column, (pa.ListArray, pa.LargeListArray)) or column.null_count or column.values.null_count:
        raise ConfigError(f"column {show(name)} is no column of lists without gaps but {column.type}", file=path)
    try:
        column.validate(full=True)
        values = column.flatten().to_numpy(zero_copy_only=not pa.types.is_boolean(column.type.value_type))
    except (pa.ArrowException, ValueError) as error:
        raise FileError(f"column {show(name)} cannot be read: {show(str(error))}", file=path) from None
    if values.dtype.kind not in "iub":
        raise ConfigError(f"column {show(name)} holds {column.type}, no integers", file=path)
    offsets = column.offsets.to_numpy().astype(np.int64)
    return values, offsets[1:] - offsets[0]
