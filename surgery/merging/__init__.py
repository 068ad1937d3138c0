"""Merge checkpoints: mergekit's YAML, models in any format, the result in any format.

    surgery.soup("merge_configs/three-seeds.yaml", "merged", to="meta")

recipe.py      the YAML, strictly                  reader.py        where it is when something is wrong
contract.py    what a method promises              parameters.py    gradients, filters, defaults
references.py  models by path or hub id            adapters.py      LoRA (lora_config.py)
layers.py      which layers make which tensor      align_experts.py experts in another order
vocabulary.py  models with different tokenizers    tokens.py        the tokenizer of a merge       padding.py
run.py         from YAML to checkpoint             search.py        greedy soups and search over weights
methods/       every method by name                engine/          blocks, threads, memory
way.py         by a table, by names, or mergekit   by_name.py       any family, name by name
depth.py       lists by layer in a config          mergekit.py      what is mergekit's alone
request.py     what can be asked of a merge        assemble.py      each tensor with its sources
view.py        models under HF's names             derive.py        the merge as a lazy checkpoint
"""
