"""Models that transformers does not have: each file here is copied beside the weights and runs without this package."""
