"""Checkpoint formats as tables, read in both directions.

    checkpoint = open_checkpoint("Llama-2-7b")          # registry.py: recognised, nothing of the weights is read

base.py       what a format is to the rest of the program       table.py      rows <-> what each rank stores
registry.py   every format by name                              topology.py   which rank holds what
rows.py       one line of a table                               replicas.py   copies that ranks store
operations.py from checkpoint to checkpoint: dtype, vocabulary  typed_keys.py typed access to a config

A folder per format, each with `format.py` and `config.py`: hf, meta, neox, megatron, olmo, olmo_core.
"""
