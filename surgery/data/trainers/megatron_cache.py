"""The batches of a Megatron-LM run from the index files that it left in its cache.

    batches = open_cache("cache/3f...-GPTDataset-train-description.txt", rows_per_step=1024)

A description names the data, and the document, sample and shuffle index lie beside it.  It does not say the pad id.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from surgery.containers.text import read_json
from surgery.data.files.idx import read_index
from surgery.data.files.mapped import Array
from surgery.data.files.npy import open_npy
from surgery.data.trainers.megatron_batches import Dataset, MegatronBatches, Special
from surgery.data.trainers.megatron_order import SampleOrder
from surgery.errors import FileError, UsageError, show

DESCRIPTION = "-description.txt"
CHUNK = 1 << 16  # samples that are checked at once


def open_cache(path: Path, rows_per_step: int | None, pad_id: int | None = None) -> MegatronBatches:
    """From the description of a GPTDataset or BlendedDataset.

    Raises FileError if the files contradict each other or the data, UsageError if nothing says the rows of a step.
    """
    if rows_per_step is None:
        raise UsageError("the cache does not say how many rows a step has", hint="give the global batch size")
    told = read_json(path, "description")
    if not isinstance(told, Mapping) or told.get("class") not in ("GPTDataset", "BlendedDataset"):
        raise FileError("describes no GPTDataset or BlendedDataset", file=path)
    if told["class"] == "GPTDataset":
        return MegatronBatches([_cached_dataset(told, path)], None, rows_per_step, Special(pad_id))
    parts = told.get("datasets")
    if not isinstance(parts, list) or not all(isinstance(p, Mapping) for p in parts):
        raise FileError("does not describe its datasets", file=path)
    order = tuple(_array(path, name)[0] for name in ("dataset_index", "dataset_sample_index"))
    datasets = [_cached_dataset(part, _description(part, path)) for part in parts]
    return MegatronBatches(datasets, (order[0], order[1]), rows_per_step, Special(pad_id))


def _description(part: Mapping[str, Any], blended: Path) -> Path:
    """Files of a dataset are named by the MD5 of its description."""
    name = hashlib.md5(json.dumps(part, indent=4).encode(), usedforsecurity=False).hexdigest()
    return blended.with_name(f"{name}-{part.get('class')}-{part.get('index_split')}{DESCRIPTION}")


def _cached_dataset(told: Mapping[str, Any], path: Path) -> Dataset:
    prefix, length = told.get("dataset_path"), told.get("sequence_length")
    if not isinstance(prefix, str) or not isinstance(length, int) or length < 2:
        raise FileError(f"says dataset_path {show(prefix)} and sequence_length {show(length)}", file=path)
    index = read_index(prefix if os.path.exists(f"{prefix}.idx") else path.parent / prefix)
    (documents, _), (flat, shape), (shuffle, _) = (
        _array(path, f"{n}_index") for n in ("document", "sample", "shuffle")
    )
    if len(shape) != 2 or shape[1] != 2 or shape[0] != len(shuffle) + 1:
        raise FileError(f"sample_index has shape {shape} for {len(shuffle)} samples", file=path)
    order = SampleOrder(documents, flat.reshape(shape), shuffle)
    dataset = Dataset(index, order, length)
    _check_order(dataset, path)
    return dataset


def _array(path: Path, name: str) -> tuple[Array, tuple[int, ...]]:
    stem = path.name.removesuffix(DESCRIPTION)
    column, shape = open_npy(path.with_name(f"{stem}-{name}.npy"))
    return column.array, shape


def _check_order(dataset: Dataset, path: Path) -> None:
    """Raise FileError unless the samples of a cache follow one another through sequences that are there."""
    documents, samples, shuffle = dataset.order.documents, dataset.order.samples, dataset.order.shuffle
    sound = (
        len(documents) > 0
        and 0 <= documents.min() <= documents.max() < len(dataset.index.lengths)
        and (not len(shuffle) or 0 <= shuffle.min() <= shuffle.max() < len(samples) - 1)
        and all(_in_line(dataset, first) for first in range(0, len(samples) - 1, CHUNK))
    )
    if not sound:
        what = f"its indices do not fit {dataset.index.path}"
        raise FileError(what, file=path, hint="they belong to other data; make them again")


def _in_line(dataset: Dataset, first: int) -> bool:
    """Whether each of CHUNK samples begins `length` tokens after the one before; the last of all may be shorter."""
    documents, samples = dataset.order.documents, dataset.order.samples
    place, at = samples[first : first + CHUNK + 1].astype(np.int64).T
    if place[0] < 0 or place[-1] >= len(documents) or (np.diff(place) < 0).any():
        return False
    lengths = dataset.index.lengths[documents[place[0] : place[-1] + 1]].astype(np.int64)
    inside, place = lengths[place - place[0]], place - place[0]
    steps = np.diff((np.cumsum(lengths) - lengths)[place] + at)
    last = first + CHUNK + 1 >= len(samples)
    right = (steps == dataset.length) | (
        (np.arange(len(steps)) == len(steps) - 1) & last & (0 < steps) & (steps < dataset.length)
    )
    return bool(at[0] >= 0 and (at[1:] >= 0).all() and (at[1:] < inside[1:]).all() and right.all())
