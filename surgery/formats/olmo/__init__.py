"""OLMo: model.pt or safetensors, and the sharded folders of its trainer.

format.py     the steps of the format           config.py   config.yaml <-> Spec
table.py      the tensors                       names.py    encoded in its safetensors files
files.py      where the tensors are             sharded.py  of the trainer's shards
optimizer.py  Adam's state in all of them
"""
