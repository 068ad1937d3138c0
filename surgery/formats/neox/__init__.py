"""GPT-NeoX: mp_rank_* and layer_* files, configs in YAML.

format.py     the steps of the format           files.py         the files, opened as tables per rank
config.py     YAML -> Spec                      write_config.py  Spec -> YAML        inert.py   keys that change nothing
table.py      the tensors                       releases.py      how each release names and packs them
optimizer.py  Adam's state, as ZeRO cuts it     universal.py    whole, as DeepSpeed's universal checkpoints are
"""
