"""GPT-NeoX: mp_rank_* and layer_* files, configs in YAML."""
