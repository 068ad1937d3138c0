"""Rows of routers from texts: what each expert is for, in examples.

    router_rows(checkpoint, "prompts", "experts.yaml", experts=4, layers=range(30))      # {0: [4, h], ...}

`prompts` reads mergekit's fields, one entry per expert (or per virtual group); `mode` and `pick` are ours:

    mode: router                     # router: what it sees | hidden: what the layer sees, as in mergekit | cheap_embed
    pick: last                       # last | mean: of the tokens; cheap_embed: the sum of their embeddings
    experts:
      - positive_prompts: ["def fib(n):", "import os"]
        negative_prompts: ["Once upon a time"]

`domains` reads one text file per expert (`domains: [code.txt, law.txt]`, beside the YAML file): the mean of what the
router sees there, less the mean over all domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.containers.text import read_yaml
from surgery.errors import ConfigError, UsageError, show
from surgery.formats.base import Checkpoint
from surgery.running.activations import each_layer, layer_inputs
from surgery.running.device import CPU, Device
from surgery.running.tokens import LENGTH, encoded, read_text
from surgery.upcycling.dense_to_moe.clusters import unit

if TYPE_CHECKING:
    import torch

Rows = dict[int, Any]
MODES, PICKS = ("router", "hidden", "cheap_embed"), ("last", "mean")
DOMAIN_TOKENS = 2048


def router_rows(
    source: Checkpoint, start: str, path: str, experts: int, layers: Sequence[int], on: Device = CPU
) -> Rows:
    """By layer, [experts, h] float64.  Raises ConfigError for a YAML file that says something else."""
    if not path:
        raise UsageError(f"--router {start}:FILE needs a YAML file")
    values = read_yaml(path, "prompts")
    made = _prompted if start == "prompts" else _domains
    return {i: rows for i, rows in made(source, values, path, experts, on).items() if i in layers}


def _entries(values: Any, key: str, path: str, experts: int, known: Sequence[str]) -> list[Any]:
    if not isinstance(values, dict) or not isinstance(values.get(key), list):
        raise ConfigError(f"has no list of {key}", file=path)
    if odd := [k for k in values if k not in known]:
        raise ConfigError(f"there is no field {show(odd[0])}", file=path, hint=f"fields: {', '.join(known)}")
    if len(values[key]) != experts:
        raise ConfigError(f"lists {len(values[key])} {key}, and the router has {experts} different rows", file=path)
    return list(values[key])


def _prompted(source: Checkpoint, values: Any, path: str, experts: int, on: Device) -> Rows:
    import torch

    entries = _entries(values, "experts", path, experts, ("experts", "mode", "pick"))
    mode, pick = values.get("mode", "router"), values.get("pick", "last")
    if mode not in MODES or pick not in PICKS:
        raise ConfigError(f"mode {show(mode)}, pick {show(pick)}", file=path,
                          hint=f"mode: {', '.join(MODES)}; pick: {', '.join(PICKS)}")  # fmt: skip
    each = []
    for entry in entries:
        vector = mean_vectors(source, _texts(entry, "positive_prompts", path), mode, pick, on)
        if isinstance(entry, dict) and entry.get("negative_prompts"):
            vector = vector - mean_vectors(source, _texts(entry, "negative_prompts", path), mode, pick, on)
        each.append(unit(vector))
    rows = torch.stack(each, 1)
    return {i: rows[i] for i in range(source.spec.layers)}


def _texts(entry: Any, key: str, path: str) -> list[str]:
    known = ("positive_prompts", "negative_prompts", "source_model")
    found = entry.get(key) if isinstance(entry, dict) and not set(entry) - set(known) else None
    if not isinstance(found, list) or not found or any(not isinstance(t, str) or not t.strip() for t in found):
        raise ConfigError(f"every expert needs a list of {key}", file=path)
    return found


def mean_vectors(source: Checkpoint, texts: Sequence[str], mode: str, pick: str, on: Device = CPU) -> torch.Tensor:
    """[layers, h] float64: the mean over prompts of a vector per layer."""
    found = [_vector(source, ids_of(source, text), mode, pick, on) for text in texts]
    total: torch.Tensor = sum(found[1:], start=found[0])
    return unit(total) if mode == "cheap_embed" else total / len(found)


def _vector(source: Checkpoint, ids: torch.Tensor, mode: str, pick: str, on: Device) -> torch.Tensor:
    import torch

    if mode == "cheap_embed":
        table = source.parts["embed"]
        rows = torch.stack([table[int(i)].double() for i in ids[0]])
        return rows.sum(0).repeat(source.spec.layers, 1)
    if mode == "hidden":
        seen = [x[0].double() for x in layer_inputs(source, ids, on)]
    else:
        found: dict[int, torch.Tensor] = {}
        each_layer(source, ids, lambda i, x, _: found.__setitem__(i, x.double()), on=on)
        seen = [found[i] for i in range(source.spec.layers)]
    return torch.stack([x[-1] if pick == "last" else x.mean(0) for x in seen])


def ids_of(source: Checkpoint, text: str) -> torch.Tensor:
    """[1, length].  Raises UsageError if the checkpoint has no tokenizer for it."""
    import torch

    ids = encoded(source, text, 1)
    if ids is None:
        raise UsageError(f"the checkpoint has no tokenizer that can read {show(text, 40)}")
    return torch.tensor([ids])


def _domains(source: Checkpoint, values: Any, path: str, experts: int, on: Device) -> Rows:
    import torch

    names = _entries(values, "domains", path, experts, ("domains",))
    means = []
    for name in names:
        if not isinstance(name, str):
            raise ConfigError("domains are names of text files", file=path)
        ids = ids_of(source, read_text(str(Path(path).parent / name)))[:, :DOMAIN_TOKENS]
        total = torch.zeros(source.spec.layers, source.spec.width, dtype=torch.float64)

        def add(layer: int, inputs: Any, _: Any, total: Any = total) -> None:
            total[layer] += unit(inputs.double()).sum(0)

        for at in range(0, ids.shape[1], LENGTH):
            each_layer(source, ids[:, at : at + LENGTH], add, on=on)
        means.append(total / ids.shape[1])
    rows = torch.stack(means, 1)
    rows = unit(rows - rows.mean(1, keepdim=True))
    return {i: rows[i] for i in range(source.spec.layers)}
