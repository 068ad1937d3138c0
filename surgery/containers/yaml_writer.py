"""Plain values as YAML that `yaml_loader` reads back as they were: to_yaml({"lr": 1e-05}) == b"lr: 1.0e-05\\n"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from surgery.containers.yaml_loader import FLOAT, PLAIN


class _Dumper(yaml.SafeDumper):
    """No aliases, and quotes around texts that our reader would take for numbers."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver(PLAIN + "float", FLOAT, list("-+0123456789"))


def to_yaml(value: Mapping[str, Any]) -> bytes:
    """Of scalars, lists and mappings, in the order in which they are given."""
    return yaml.dump(dict(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True).encode()
