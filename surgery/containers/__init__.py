"""Bytes on disk <-> tables of lazy tensors, with no knowledge of models.

table = open_tensors("Qwen3-0.6B/")             # a folder, an index, or one file
table["model.norm.weight"].full()
open_file("model_optim_rng.pt").root["args"]    # the described object of a torch file

opening.py        any file, by its content                      output.py        what a file to be written will hold
safetensors.py    read and written                              hub.py           repositories in the local cache
torch_zip.py      torch.save since 1.6                          torch_legacy.py  and before
torch_writer.py   written as torch.save does                    zip_directory.py where a zip's members lie
dcp.py            folders of torch.distributed.checkpoint       dcp_writer.py    and planned ones
text.py           JSON, YAML and trackers                       yaml_loader.py, yaml_writer.py
pickles/          described, never executed
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
