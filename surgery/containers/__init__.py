"""Bytes on disk <-> tables of lazy tensors, with no knowledge of models.

table = open_tensors("Qwen3-0.6B/")             # a folder, an index, or one file
table["model.norm.weight"].full()
open_file("model_optim_rng.pt").root["args"]    # the described object of a torch file
"""

from surgery.containers.opening import Container, TensorTable, open_file, open_tensors

__all__ = ["Container", "TensorTable", "open_file", "open_tensors"]
