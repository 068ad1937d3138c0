"""Megatron-LM: mp_rank_* folders (`format.py`) and torch_dist (`dist.py`).

config.py     args <-> Spec                     inert.py      args that change nothing
table.py      the tensors, in every spelling    entries.py    what both formats say besides their tensors
files.py      a run, its iterations and ranks
"""
