"""Modules that are copied beside the weights where transformers has none of the kind, and run without this package."""
