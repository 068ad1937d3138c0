"""Libraries that only some work needs, and the extra that installs them.

needs("pyarrow", "reading Parquet")        # SurgeryError with the pip command if it is missing
"""

from __future__ import annotations

import importlib.util

from surgery.errors import SurgeryError


def needs(module: str, what: str) -> None:
    """Raise SurgeryError if a module that `what` needs is not installed."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        found = False
    if not found:
        hint = "pip install 'checkpoint-surgery[data]'"
        raise SurgeryError(f"{what} needs the package {module.split('.')[0]}, which is not installed", hint=hint)
