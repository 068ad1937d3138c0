"""The batches of a Megatron-LM run: from its settings, or from the index files that it left in its cache.

    # run.yaml
    megatron:
      data: [0.7, tok/web, 0.3, tok/math]         # as --data-path
      sequence_length: 4096
      seed: 1234
      split: 969,30,1
      samples: 1_000_000                          # train-iters x global batch size
      rows_per_step: 1024                         # the global batch size

    batches = open_megatron("run.yaml")
    batches = open_megatron("cache/3f...-GPTDataset-train-description.txt", rows_per_step=1024)
    batches.rows(step=0)

A sample has one token more than the sequence, so every position has a label.  Tokens equal to the pad id (if the
tokenizer has one) are no labels and become 0, wherever they come from.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from surgery.containers.text import read_json
from surgery.data.files.idx import Index, read_index
from surgery.data.files.mapped import Array, mapped
from surgery.data.files.npy import open_npy
from surgery.data.files.tokens import Passage
from surgery.data.rows import IGNORE, Rows, share
from surgery.data.strict import Strict, read_model
from surgery.data.trainers.megatron_order import (
    SampleOrder,
    blend,
    exhaustive_blend,
    normalized,
    sample_order,
    split_documents,
    surplus_samples,
)
from surgery.errors import ConfigError, FileError, UsageError, show

SPLITS = ("train", "valid", "test")
DESCRIPTION = "-description.txt"


class Settings(Strict):
    """`data` as --data-path: one prefix, prefixes alone (each passed once), or weights and prefixes in turn."""

    data: Annotated[tuple[str | float, ...], BeforeValidator(lambda v: _as_tuple(v)), Field(min_length=1)]
    sequence_length: Annotated[int, Field(gt=1)]
    samples: Annotated[int, Field(gt=0)] | None = None
    rows_per_step: Annotated[int, Field(gt=0)]
    seed: int = 1234
    split: str = "969,30,1"
    part: Literal["train", "valid", "test"] = "train"
    pad_id: int | None = None


class Run(Strict):
    """A YAML file of such settings."""

    megatron: Settings


def _as_tuple(value: Any) -> Any:
    listed = value if isinstance(value, list) else [value]
    return tuple(float(v) if type(v) is int else v for v in listed)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A GPTDataset: an index and the order of its samples of `length` tokens and one more."""

    index: Index
    order: SampleOrder
    length: int

    def pieces(self, number: int) -> list[Passage]:
        """What sample `number` of the shuffled order is made of: sequences and tokens of the payload."""
        (first, begin), (last, end) = self.order.span(int(self.order.shuffle[number]))
        found = []
        for at in range(first, last + 1):
            sequence = int(self.order.documents[at])
            start = int(self.index.offsets[sequence]) // self.index.dtype.itemsize
            stop = start + (end + 1 if at == last else int(self.index.lengths[sequence]))
            found.append(Passage(self.index.payload, sequence, start + (begin if at == first else 0), stop))
        return [p for p in found if p.stop > p.start]

    def sample(self, number: int, pad: int) -> Array:
        """int64 [length + 1]; the last sample of a validation set may end in padding."""
        ids = mapped(self.index.payload, self.index.dtype).array
        out = np.full(self.length + 1, pad, np.int64)
        at = 0
        for piece in self.pieces(number):
            out[at : at + piece.stop - piece.start] = ids[piece.start : piece.stop]
            at += piece.stop - piece.start
        return out


class MegatronBatches:
    """Samples in the order of the run.  `blended`: dataset and number of every sample; None: one dataset."""

    def __init__(
        self,
        datasets: Sequence[Dataset],
        blended: tuple[Array, Array] | None,
        rows_per_step: int,
        pad_id: int | None = None,
    ) -> None:
        self.datasets, self.rows_per_step, self.pad_id = tuple(datasets), rows_per_step, pad_id
        self.sequence_length = datasets[0].length
        self.sources = tuple(d.index.path.stem for d in datasets)
        count = len(datasets[0].order.shuffle)
        self._order = blended or (np.zeros(count, np.int16), np.arange(count))

    def __len__(self) -> int:
        return len(self._order[0]) // self.rows_per_step

    def rows(self, step: int, rank: int = 0, world: int = 1) -> Rows:
        """A rank's share of a step."""
        if not 0 <= step < len(self):
            raise UsageError(f"there is no step {step}", hint=f"steps count from 0 to {len(self) - 1}")
        at = slice(step * self.rows_per_step, (step + 1) * self.rows_per_step)
        mine = share(self.rows_per_step, rank, world)
        source, instance = (np.asarray(column[at], np.int64)[mine] for column in self._order)
        pad = -1 if self.pad_id is None else self.pad_id
        samples = [self.datasets[s].sample(int(i), pad) for s, i in zip(source, instance, strict=True)]
        ids = np.stack(samples) if samples else np.empty((0, self.sequence_length + 1), np.int64)
        tokens, labels = ids[:, :-1].copy(), ids[:, 1:].copy()
        tokens[tokens == pad] = 0
        labels[labels == pad] = IGNORE
        return Rows(tokens, labels, None, source, instance)

    def passages(self, source: int, instance: int) -> list[Passage]:
        """Where the tokens of a sample lie, the extra one included."""
        return self.datasets[source].pieces(instance)


def open_megatron(
    path: str | os.PathLike[str], rows_per_step: int | None = None, pad_id: int | None = None
) -> MegatronBatches:
    """From a YAML file of settings, or the description of a cached dataset, which does not say the pad id.

    Raises FileError or ConfigError if they contradict the data, UsageError if nothing says the rows of a step.
    """
    path = Path(path)
    if path.name.endswith(DESCRIPTION):
        return _cached(path, rows_per_step, pad_id)
    given = {"rows_per_step": rows_per_step, "pad_id": pad_id}
    settings = read_model(path, Run, "Megatron run").megatron
    chosen = settings.model_copy(update={k: v for k, v in given.items() if v is not None})
    return _computed(chosen, path.parent)


def _computed(run: Settings, root: Path) -> MegatronBatches:
    prefixes, weights = _prefixes(run.data)
    if weights and run.samples is None:
        raise ConfigError("weights need samples: the number to draw", hint="samples: train-iters x global batch size")
    single = len(prefixes) == 1 and not weights
    wanted: Sequence[int | None] = [run.samples if single else None] * len(prefixes)
    if weights and run.samples is not None:
        wanted = surplus_samples(weights, run.samples)
    datasets = [_dataset(read_index(root / p), n, run) for p, n in zip(prefixes, wanted, strict=True)]
    if single:
        return MegatronBatches(datasets, None, run.rows_per_step, run.pad_id)
    sizes = [len(d.order.shuffle) for d in datasets]
    if weights and run.samples is not None:
        order = blend(normalized(weights), sum(surplus_samples(weights, run.samples, 0)))  # normalized twice, as there
    elif run.samples is None:
        order = exhaustive_blend(sizes)
    else:
        order = blend(sizes, min(run.samples, sum(sizes)))
    return MegatronBatches(datasets, order, run.rows_per_step, run.pad_id)


def _prefixes(data: Sequence[str | float]) -> tuple[list[str], list[float]]:
    """Prefixes and weights; no weights if none are given.  Raises ConfigError unless they alternate."""
    weights, prefixes = list(data[0::2]), list(data[1::2])
    if all(isinstance(d, str) for d in data):
        return [str(d) for d in data], []
    if len(weights) != len(prefixes) or not all(isinstance(w, float) and w > 0 for w in weights):
        raise ConfigError("data is neither prefixes nor weights and prefixes in turn", hint="[0.7, web, 0.3, math]")
    return [str(p) for p in prefixes], [float(w) for w in weights]


def _dataset(index: Index, samples: int | None, run: Settings) -> Dataset:
    documents = split_documents(run.split, len(index.lengths))[SPLITS.index(run.part)]
    return Dataset(
        index, sample_order(index.lengths, documents, samples, run.sequence_length, run.seed), run.sequence_length
    )


def _cached(path: Path, rows_per_step: int | None, pad_id: int | None) -> MegatronBatches:
    if rows_per_step is None:
        raise UsageError("the cache does not say how many rows a step has", hint="give the global batch size")
    told = read_json(path, "description")
    if not isinstance(told, Mapping) or told.get("class") not in ("GPTDataset", "BlendedDataset"):
        raise FileError("describes no GPTDataset or BlendedDataset", file=path)
    if told["class"] == "GPTDataset":
        return MegatronBatches([_cached_dataset(told, path)], None, rows_per_step, pad_id)
    parts = told.get("datasets")
    if not isinstance(parts, list) or not all(isinstance(p, Mapping) for p in parts):
        raise FileError("does not describe its datasets", file=path)
    order = tuple(_array(path, name)[0] for name in ("dataset_index", "dataset_sample_index"))
    datasets = [_cached_dataset(part, _description(part, path)) for part in parts]
    return MegatronBatches(datasets, (order[0], order[1]), rows_per_step, pad_id)


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
    _check_order(order, index, path)
    return Dataset(index, order, length)


def _array(path: Path, name: str) -> tuple[Array, tuple[int, ...]]:
    stem = path.name.removesuffix(DESCRIPTION)
    column, shape = open_npy(path.with_name(f"{stem}-{name}.npy"))
    return column.array, shape


def _check_order(order: SampleOrder, index: Index, path: Path) -> None:
    """Raise FileError unless all that the indices name is there."""
    sound = (
        len(order.documents) > 0
        and 0 <= order.documents.min() <= order.documents.max() < len(index.lengths)
        and 0 <= order.samples[:, 0].min() <= order.samples[:, 0].max() < len(order.documents)
        and (order.samples[:, 1] >= 0).all()
        and (order.samples[:, 1] <= index.lengths[order.documents[order.samples[:, 0]]]).all()
        and (np.diff(order.samples[:, 0]) >= 0).all()
        and (not len(order.shuffle) or order.shuffle.max() < len(order.samples) - 1)
    )
    if not sound:
        raise FileError(
            f"its indices do not fit {index.path}", file=path, hint="they belong to other data; make them again"
        )
