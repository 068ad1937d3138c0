"""The files of a Hugging Face folder: weights, filled up to a size in the order of the layers, and code.

weight_files({"model.embed_tokens.weight": stored, ...}, 5_000_000_000)
code_of("modeling_attention_moe.py")            # the bytes of the file that is shipped with this package
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from surgery.containers.output import OutputFile, text_file
from surgery.containers.safetensors import safetensors_file
from surgery.formats.weave import Stored
from surgery.tensors.files import read_small

_NUMBER = re.compile(r"\d{1,6}")  # of a layer or an expert; longer ones are names like others


def weight_files(stored: Mapping[str, Stored], limit: int) -> list[OutputFile]:
    """model.safetensors, or model-NNNNN-of-NNNNN.safetensors of up to `limit` bytes each (one tensor at least)."""
    shards: list[dict[str, Stored]] = [{}]
    filled = 0
    for name in sorted(stored, key=_natural):
        nbytes = stored[name].tensor.nbytes
        if shards[-1] and filled + nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = stored[name]
        filled += nbytes
    if len(shards) == 1:
        return [safetensors_file("model.safetensors", {k: s.tensor for k, s in shards[0].items()})]
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    total = sum(s.tensor.nbytes for s in stored.values())
    places = {k: name for name, shard in zip(names, shards, strict=True) for k in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    files = [
        safetensors_file(n, {k: s.tensor for k, s in shard.items()}) for n, shard in zip(names, shards, strict=True)
    ]
    return [*files, text_file("model.safetensors.index.json", to_json(index))]


def _natural(name: str) -> tuple[tuple[bool, str, int], ...]:
    """Sorts layer 2 before layer 10."""
    return tuple((True, "", int(t)) if _NUMBER.fullmatch(t) else (False, t, 0) for t in name.split("."))


def to_json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def code_of(name: str) -> bytes:
    """A modelling file that lies beside the weights of a family that transformers does not have."""
    return (Path(__file__).parent / "hub" / name).read_bytes()


def check_code(path: Path) -> tuple[str, ...]:
    """Notes on the modelling file of a folder, which is compared with ours and never run."""
    if not path.is_file():
        return (f"{path.name} is missing, without which transformers cannot load the folder",)
    if read_small(path, 1 << 20, "modelling file") != code_of(path.name):
        return (f"{path.name} is not the one of this version, and may compute something else",)
    return ()
