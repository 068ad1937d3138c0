"""Megatron-LM: mp_rank_* folders (`format.py`) and torch_dist (`dist.py`).

config.py     args <-> Spec                     inert.py      args that change nothing
table.py      the tensors, in every spelling    entries.py    what both formats say besides their tensors
files.py      a run, its iterations and ranks   order.py      in which Megatron numbers parameters
optimizer.py  Adam's state in mp_rank_* files, written by optimizer_writer.py
dist_optimizer.py  of torch_dist, where it lies as the weights do; rank_buffers.py: in the buffers of ranks
parameters.py  what a rank trains               buffers.py    flat buffers, read and written
stages.py      layers of uneven pipelines, told by buffers
"""
