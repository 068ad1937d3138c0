"""Modules that are copied beside the weights where transformers has none of the kind, and run without this package.

modeling_attention_moe.py     groups of attention heads as experts
modeling_sparse_attention.py  masks by head            sparse_patterns.py   what they let heads see
"""
