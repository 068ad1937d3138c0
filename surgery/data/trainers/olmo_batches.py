"""The batches of an OLMo run: its `config.yaml`, and `global_indices.npy` or the seed.

    batches = open_olmo("run")                  # run/config.yaml, run/global_indices.npy or run/train_data/...
    batches.rows(step=0).tokens                 # int64 [4, 64]
    batches.passages(0, 16)                     # instance 16 lies in part-1-00000.npy

Of every file the instances are cut from its front, and what is left at its end is not used.  An entry of the order file
is a bare uint32 (`olmo/data/iterable_dataset.py`); where there is no such file, the order of the first epoch is made of
the seed.  Label masks (`label_mask_paths`) hold a bool for each token.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from surgery.containers.text import read_yaml
from surgery.data.files.mapped import Array, mapped
from surgery.data.files.readers import UNSIGNED, open_tokens
from surgery.data.files.tokens import Passage, TokenSource
from surgery.data.rows import IGNORE, Rows, restarting_after, share, shifted
from surgery.data.trainers.olmo_order import olmo_order, repetitive
from surgery.errors import ConfigError, UsageError, show

FILTER = ("repetition_min_period", "repetition_max_period", "repetition_max_count")
CONFIG, ORDER = "config.yaml", ("global_indices.npy", "train_data/global_indices.npy")


class OlmoBatches:
    """Instances of `length` tokens, file by file, in an order of their numbers.

    filter   the arguments of `repetitive`: rows that it finds have no labels
    eos      documents are isolated, and end with this id; None: they see each other
    """

    def __init__(
        self,
        files: TokenSource,
        order: Array,
        length: int,
        rows_per_step: int,
        filter: tuple[int, int, int] | None = None,
        eos: int | None = None,
    ) -> None:
        """Raises ConfigError if the order names instances that are not there."""
        self.files, self.order, self.sequence_length, self.rows_per_step = files, order, length, rows_per_step
        self.filter, self.eos = filter, eos
        self.sources: tuple[str, ...] = (files.name,)
        counts = [f.tokens // length for f in files.files]
        self._firsts = np.cumsum([0, *counts])
        if len(order) and int(order.max()) >= self._firsts[-1]:
            what = f"the order names instance {order.max()}, and the files have {self._firsts[-1]} of {length} tokens"
            raise ConfigError(what, hint="the config, the files and the order belong to different runs")

    def __len__(self) -> int:
        return len(self.order) // self.rows_per_step

    def rows(self, step: int, rank: int = 0, world: int = 1) -> Rows:
        """A rank's share of a step."""
        if not 0 <= step < len(self):
            raise UsageError(f"there is no step {step}", hint=f"steps count from 0 to {len(self) - 1}")
        mine = self.order[step * self.rows_per_step :][share(self.rows_per_step, rank, world)].astype(np.int64)
        starts = self._starts(mine)
        tokens = self.files.windows(starts, self.sequence_length)
        labels = shifted(tokens, self.files.label_mask(starts, self.sequence_length))
        if self.filter is not None:
            labels[repetitive(tokens, *self.filter)] = IGNORE
        positions = None if self.eos is None else restarting_after(tokens, self.eos)
        return Rows(tokens, labels, positions, np.zeros(len(mine), np.int64), mine)

    def passages(self, source: int, instance: int) -> list[Passage]:
        """Where the tokens of an instance lie."""
        return self.files.passages(int(self._starts(np.array([instance]))[0]), self.sequence_length)

    def _starts(self, instances: Array) -> Array:
        file = np.searchsorted(self._firsts, instances, side="right") - 1
        starts: Array = self.files.firsts[file] + (instances - self._firsts[file]) * self.sequence_length
        return starts


def open_olmo(path: str | os.PathLike[str], rows_per_step: int | None = None) -> OlmoBatches:
    """A run by its folder or its config.yaml.

    Raises ConfigError if the config lacks what is needed or uses what is not known here, FileError if a file is broken.
    """
    path = Path(path)
    config_path = path / CONFIG if path.is_dir() else path
    config = read_yaml(config_path, "config")
    data, model = _section(config, "data", config_path), _section(config, "model", config_path)
    if data.get("datasets"):
        raise ConfigError("data.datasets is set, and only data.paths is known here", file=config_path)
    files = _open_files(config, data, model, config_path)
    length = _number(model, "max_sequence_length", config_path, least=1)
    given = next((p for p in (config_path.parent / name for name in ORDER) if p.is_file()), None)
    if given is not None:
        order = mapped(given, "u4").array
    else:
        seed = data.get("seed")
        seed = _number(config, "seed", config_path) if seed is None else _number(data, "seed", config_path)
        order = olmo_order(sum(f.tokens // length for f in files.files), seed)
    batch = rows_per_step or _number(config, "global_train_batch_size", config_path, least=1)
    eos = _number(model, "eos_token_id", config_path) if data.get("generate_doc_lengths") else None
    return OlmoBatches(files, order, length, batch, _filter(data, config_path), eos)


def _open_files(config: Any, data: Mapping[str, Any], model: Mapping[str, Any], at: Path) -> TokenSource:
    paths, masks = _paths(data, "paths"), _paths(data, "label_mask_paths")
    if not paths:
        raise ConfigError("data.paths lists no files", file=at)
    if data.get("label_mask_paths") is not None and len(masks) != len(paths):
        raise ConfigError("data.label_mask_paths does not name a file for each of data.paths", file=at)
    dtype, vocabulary = data.get("memmap_dtype", "uint16"), _number(model, "vocab_size", at)
    if dtype not in UNSIGNED.values():
        raise ConfigError(f"data.memmap_dtype is {show(dtype)}", file=at)
    found = []
    for file, mask in zip(paths, masks or ["none"] * len(paths), strict=True):
        where = mask if mask == "none" else str(at.parent / mask)
        found += open_tokens(at.parent / file, "dolma", dtype=dtype, mask=where, vocab_size=vocabulary)
    return TokenSource(str(config.get("run_name") or "olmo"), tuple(found), vocabulary)


def _filter(data: Mapping[str, Any], at: Path) -> tuple[int, int, int] | None:
    """The arguments of `repetitive`; None: no rows are left out."""
    if not data.get("instance_filter"):
        return None
    chosen = _section(data, "instance_filter", at)
    shortest, longest, times = (_number(chosen, key, at, least=1) for key in FILTER)
    return shortest, longest, times


def _paths(section: Mapping[str, Any], key: str) -> list[str]:
    """A list of paths; empty if it is none."""
    value = section.get(key)
    return value if isinstance(value, list) and all(isinstance(path, str) for path in value) else []


def _section(config: Any, key: str, at: Path) -> Mapping[str, Any]:
    found = config.get(key) if isinstance(config, Mapping) else None
    if not isinstance(found, Mapping):
        raise ConfigError(f"has no section {key}, so it is no config of an OLMo run", file=at)
    return found


def _number(section: Mapping[str, Any], key: str, at: Path, least: int = 0) -> int:
    value = section.get(key)
    if type(value) is not int or value < least:
        raise ConfigError(f"{key} is {show(value)}, not a whole number from {least} on", file=at)
    return value
