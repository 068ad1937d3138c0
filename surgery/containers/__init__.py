"""Bytes on disk <-> tables of lazy tensors, with no knowledge of models.

table = open_tensors("Qwen3-0.6B/")             # a folder, an index, or one file
table["model.norm.weight"].full()
open_file("model_optim_rng.pt").root["args"]    # the described object of a torch file
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.containers.opening import Container, TensorTable, open_file, open_tensors

__all__ = ["Container", "TensorTable", "open_file", "open_tensors"]


def __getattr__(name: str) -> Any:
    """Import on first use: who reads a small text file needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module 'surgery.containers' has no attribute {name!r}")
    from surgery.containers import opening

    return getattr(opening, name)
