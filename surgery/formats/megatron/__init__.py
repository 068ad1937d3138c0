"""Megatron-LM: mp_rank_* folders (`format.py`) and torch_dist (`dist.py`)."""
