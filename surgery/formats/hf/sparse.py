"""Sparse attention in Hugging Face's config.json, and the modules that a folder with it carries.

    read_sparse({"sparse_attention": {"kind": "spattention", "reference_len": 1024}}, 16, "config.json")   # a Sparse
    config |= write_sparse(spec.sparse) | auto_map("LlamaForCausalLM")

The modules are our own (`hub/`); what another folder carries under their names is never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.errors import ConfigError, show
from surgery.formats.hf.hub.sparse_patterns import pattern_of
from surgery.model.sparse import Sparse

KEY = "sparse_attention"
MODELING = "modeling_sparse_attention"
MODULES = (f"{MODELING}.py", "sparse_patterns.py")
NOTE = ("sparse attention is computed by a module in the folder: load it with trust_remote_code=True; without, "
        "transformers computes full attention")  # fmt: skip
MAX_LENGTH = 1 << 24


def read_sparse(config: Mapping[str, Any], heads: int, file: str) -> Sparse | None:
    """What the config says; None where attention is full.  Raises ConfigError for what is not understood."""
    said = config.get(KEY)
    if said is None:
        return None
    if not isinstance(said, dict) or not isinstance(said.get("kind"), str):
        raise ConfigError(f"{KEY} is {show(said)}, not a kind with its numbers", file=file)
    numbers = {k: v for k, v in said.items() if k != "kind"}
    if odd := [k for k, v in numbers.items() if type(v) is not int or not 0 < v <= MAX_LENGTH]:
        raise ConfigError(f"{KEY}: {show(odd[0])} is {show(numbers[odd[0]])}, not a number from 1 on", file=file)
    if "reference_len" not in numbers:
        raise ConfigError(f"{KEY} does not say reference_len, the length that it was made for", file=file)
    return sparse_of(said["kind"], numbers.pop("reference_len"), heads, numbers, file)


def sparse_of(kind: str, length: int, heads: int, given: Mapping[str, int], file: str | None = None) -> Sparse | None:
    """A kind with all its numbers; None if it is full.  Raises ConfigError for a kind or number that there is not."""
    try:
        pattern = pattern_of(kind, length, heads, given)
    except ValueError as error:
        raise ConfigError(str(error), file=file) from None
    return None if kind == "full" else Sparse(kind, length, dict(pattern.numbers))


def write_sparse(sparse: Sparse | None) -> dict[str, Any]:
    """The key of the config; {} where attention is full."""
    return {KEY: {"kind": sparse.kind, "reference_len": sparse.reference_len, **sparse.numbers}} if sparse else {}


def auto_map(architecture: str) -> dict[str, Any]:
    """The key that leads transformers to the module."""
    return {"auto_map": {"AutoModelForCausalLM": f"{MODELING}.Sparse{architecture}"}}


def implementation(config: Any, by: str | None) -> str | None:
    """By what transformers is to compute the attention of a model with its `config`: `by`, where it is full."""
    if getattr(config, KEY, None) is None:
        return by
    from surgery.formats.hf.hub.modeling_sparse_attention import register

    return register()
