"""Checkpoint formats as tables, read in both directions.

    checkpoint = open_checkpoint("Llama-2-7b")          # registry.py: recognised, nothing of the weights is read

base.py        what a format is, the order of its steps           table.py      rows: tensors and their parts
registry.py    every format by name                              weave.py      rows <-> what each rank stores
account.py     every file and entry is read, carried or named    topology.py   which rank holds what
keys.py        keys of a config, in both directions              replicas.py   copies that ranks store
operations.py  from checkpoint to checkpoint: dtype, rows        names.py      many names in few words
unknown.py     what nobody understands is refused                wrappers.py   names without what training wraps around
optimizer.py   Adam's state beside the weights                   dcp_states.py states in torch's DCP folders
flat.py        tensors in flat buffers                          torch_states.py  states in torch's state dicts
padding.py     rows of the vocabulary that are no tokens

A folder per format, each with `format.py`, `table.py` and `config.py`: hf, meta, neox, megatron, olmo, olmo_core.
"""
