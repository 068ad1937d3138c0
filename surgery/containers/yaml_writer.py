"""Plain values as YAML: to_yaml({"lr": 1e-05}) == b"lr: 1.0e-05\\n", in the order in which they are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def to_yaml(value: Mapping[str, Any]) -> bytes:
    """Of scalars, lists and mappings."""
    import yaml

    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True).encode()
