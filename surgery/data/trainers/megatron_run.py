"""A Megatron-LM run: a YAML file of its settings, from which its order is computed; or its cache.

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
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from surgery.data.files.idx import Index, read_index
from surgery.data.strict import Strict, read_model
from surgery.data.trainers.megatron_batches import Dataset, MegatronBatches, Special
from surgery.data.trainers.megatron_cache import DESCRIPTION, open_cache
from surgery.data.trainers.megatron_order import (
    blend,
    exhaustive_blend,
    normalized,
    sample_order,
    split_documents,
    surplus_samples,
)
from surgery.errors import ConfigError

Id = Annotated[int, Field(ge=0, lt=1 << 32)]
SPLITS = ("train", "valid", "test")


class Settings(Strict):
    """What decides the samples, and what of them is learnt.

    data           as --data-path: one prefix, prefixes alone (each passed once), or weights and prefixes in turn
    eod_id         the id that ends documents
    eod_mask_loss  what follows that id is not learnt
    isolate        documents do not see each other: --reset-position-ids and --reset-attention-mask
    add_extra_token_to_sequence, drop_last_partial_validation_sequence   as in GPTDatasetConfig
    """

    data: Annotated[tuple[str | float, ...], BeforeValidator(lambda v: _as_tuple(v)), Field(min_length=1)]
    sequence_length: Annotated[int, Field(gt=1, le=1 << 24)]
    samples: Annotated[int, Field(gt=0)] | None = None
    rows_per_step: Annotated[int, Field(gt=0)]
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 1234
    split: str = "969,30,1"
    part: Literal["train", "valid", "test"] = "train"
    pad_id: Id | None = None
    eod_id: Id | None = None
    eod_mask_loss: bool = False
    isolate: bool = False
    add_extra_token_to_sequence: bool = True
    drop_last_partial_validation_sequence: bool = True

    @model_validator(mode="after")
    def _eod_known(self) -> Settings:
        if self.eod_id is None and (self.eod_mask_loss or self.isolate):
            raise ValueError("eod_mask_loss and isolate need eod_id, the id that ends documents")
        return self


class Run(Strict):
    """A YAML file of such settings."""

    megatron: Settings


def _as_tuple(value: Any) -> Any:
    listed = value if isinstance(value, list) else [value]
    return tuple(float(v) if type(v) is int else v for v in listed)


def open_megatron(
    path: str | os.PathLike[str], rows_per_step: int | None = None, pad_id: int | None = None
) -> MegatronBatches:
    """From a YAML file of settings, or the description of a cached dataset, which does not say the pad id.

    Raises FileError or ConfigError if they contradict the data, UsageError if nothing says the rows of a step.
    """
    path = Path(path)
    if path.name.endswith(DESCRIPTION):
        return open_cache(path, rows_per_step, pad_id)
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
    special = Special(run.pad_id, run.eod_id if run.eod_mask_loss else None, run.eod_id if run.isolate else None)
    if single:
        return MegatronBatches(datasets, None, run.rows_per_step, special)
    sizes = [len(d) for d in datasets]
    if weights and run.samples is not None:
        order = blend(normalized(weights), sum(surplus_samples(weights, run.samples, 0)))  # normalized twice, as there
    elif run.samples is None:
        order = exhaustive_blend(sizes)
    else:
        order = blend(sizes, min(run.samples, sum(sizes)))
    return MegatronBatches(datasets, order, run.rows_per_step, special)


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
    extra, whole = run.add_extra_token_to_sequence, run.part != "valid" or run.drop_last_partial_validation_sequence
    length, seed = run.sequence_length, run.seed
    try:
        order = sample_order(index.lengths, documents, samples, length, seed, extra=extra, drop_last=whole)
    except ConfigError as error:
        raise ConfigError(error.what, file=index.path, hint=error.hint) from None
    return Dataset(index, order, length, int(extra))
