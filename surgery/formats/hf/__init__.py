"""Hugging Face: config.json, safetensors (one, or sharded with an index) or .bin files."""
