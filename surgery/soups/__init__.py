"""Merge checkpoints: mergekit's YAML, models in any format, the result in any format.

    surgery.soup("merge_configs/three-seeds.yaml", "merged", to="meta")

config.py    the YAML, strictly             engine.py        merged tensors, block by block, in threads
settings.py  gradients, filters, defaults   select.py        the n-th smallest of many values
references.py  models by path or hub id     masks.py         random numbers that belong to elements
adapters.py  LoRA                           layers.py        which layers make which tensor
vocabulary.py  tokenizers                   experts.py       experts in another order
methods.py   every method by name:          elementwise.py  spheres.py  tasks.py  consensus.py  fusion.py
run.py       from YAML to checkpoint        search.py        greedy soups and search over weights
delegate.py  what is mergekit's alone
"""
