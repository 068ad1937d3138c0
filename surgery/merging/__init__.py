"""Merge checkpoints: mergekit's YAML, models in any format, the result in any format.

    surgery.soup("merge_configs/three-seeds.yaml", "merged", to="meta")

config.py      the YAML, strictly                  settings.py       gradients, filters, defaults
references.py  models by path or hub id            adapters.py       LoRA
layers.py      which layers make which tensor      vocabulary.py     tokenizers       padding.py   tokens.py
align_experts.py  experts in another order         delegate.py       what is mergekit's alone
run.py         from YAML to checkpoint             search.py         greedy soups and search over weights
methods/       every method by name                engine/           blocks, threads, memory
"""
