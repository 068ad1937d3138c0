"""Checkpoint surgery: convert, inspect, verify, upcycle and merge large-language-model checkpoints."""
