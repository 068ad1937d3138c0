"""What the small files of a kind say about it: lines for people, and words for the next step.

    adapter(Path("lora"))      # {"adapter": "LORA, rank 8", "base": "meta-llama/Llama-2-7b-hf"}

Nothing here raises on a broken file: the line is left out.
"""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.containers.text import read_json, read_yaml
from surgery.errors import SurgeryError, show, some
from surgery.tensors.files import File, size_of
from surgery.units import human

_SHARD = re.compile(r"([\w.]+)-(\d{1,6})-of-(\d{1,6})(\.\w+)")
_NPY = re.compile(rb"\{'descr': '([^']{1,16})'.{0,40}?'shape': \(([0-9, ]{0,120})\)")


def read(path: Path) -> Mapping[str, Any]:
    """A JSON or YAML file's mapping; an empty one if there is none."""
    with contextlib.suppress(SurgeryError):
        value = (read_yaml if path.suffix in (".yaml", ".yml") else read_json)(path, path.name)
        return value if isinstance(value, dict) else {}
    return {}


def _text(value: object) -> str:
    return show(value)[1:-1] if isinstance(value, str) else show(value)


def adapter(folder: Path) -> dict[str, str]:
    """peft's adapter_config.json."""
    config = read(folder / "adapter_config.json")
    rank = f", rank {_text(config['r'])}" if "r" in config else ""
    base = config.get("base_model_name_or_path")
    named = {"base": _text(base)} if isinstance(base, str) and base else {}
    return {"adapter": _text(config.get("peft_type", "of an unknown kind")) + rank, **named}


def family(folder: Path) -> dict[str, str]:
    """The model_type of a config.json, in the folder or one below."""
    for path in (folder / "config.json", folder / "huggingface" / "config.json"):
        if isinstance(kind := read(path).get("model_type"), str):
            return {"family": _text(kind)}
    return {}


def run_checkpoint(folder: Path) -> dict[str, str]:
    """The step, as MANIFEST.json says it."""
    return {"step": show(read(folder / "MANIFEST.json").get("step", "N"))}


def size(path: Path) -> dict[str, str]:
    return {"size": human(size_of(path))}


def npy(path: Path) -> dict[str, str]:
    """dtype and shape, from NumPy's header."""
    file = File(path)
    found = _NPY.search(file.read(0, min(file.size, 512), "header"))
    if not found:
        return size(path)
    return {"array": f"{found[1].decode('ascii', 'replace')} ({found[2].decode()})", **size(path)}


def gguf(path: Path) -> dict[str, str]:
    """Version and counts of the header (github.com/ggml-org/ggml, docs/gguf.md)."""
    file = File(path)
    if file.size < 24:
        return size(path)
    version, tensors, pairs = struct.unpack("<IQQ", file.read(4, 20, "header"))
    return {"GGUF version": show(version), "tensors": show(tensors), "metadata": f"{show(pairs)} keys", **size(path)}


def recipe(path: Path) -> dict[str, str]:
    """What a YAML or JSON file is about, by its keys."""
    keys = set(read(path))
    return {"keys": ", ".join(_text(k) for k in sorted(map(str, keys))[:12])} if keys else {}


def whole_index(path: Path) -> dict[str, str]:
    """How many tensors and shards an index lists."""
    found = read(path).get("weight_map")
    if not isinstance(found, dict):
        return {}
    return {"lists": f"{len(found)} tensors in {len(set(map(str, found.values())))} shards"}


def lost(folder: Path) -> str:
    """The shards that are not there, by the numbers in names: model-00001-of-00002.safetensors."""
    there = {m[0]: m for p in folder.iterdir() if (m := _SHARD.fullmatch(p.name))}
    wanted = {f"{m[1]}-{i:0{len(m[2])}d}-of-{m[3]}{m[4]}"
              for m in there.values() for i in range(1, min(int(m[3]), 10_000) + 1)}  # fmt: skip
    return some(sorted(wanted - there.keys()))
