"""Hugging Face: config.json, safetensors (one, or sharded with an index) or .bin files.

format.py     the steps of the format           families.py   what the keys of each family mean
config.py     config.json <-> Spec              rope.py       its rotary embeddings     moe.py   its experts
table.py      the tensors of a family           rows.py       as data                   files.py the weight files
inert.py      keys that change nothing, and why                               sparse.py   sparse attention
heads.py      tied models whose head is stored alone, or is another one        further.py  layers for further tokens
optimizer.py  a state of Adam beside the weights        order.py      the numbers that a Trainer gives it
"""
