"""Print the flags with which recipes/quickstart.yaml suits a model, quoted as a shell or xargs reads them.

    python recipes/fitting.py Qwen/Qwen2.5-0.5B         # --set model=/... --set tp=2 --set context=32768

Ranks share the groups of attention heads evenly; Meta's params.json has no place for the longest context.
"""

from __future__ import annotations

import shlex
import sys

from small_model import Unavailable, obtain
from surgery.errors import SurgeryError
from surgery.formats.registry import open_checkpoint


def flags(model: str) -> list[str]:
    folder = obtain(model)
    spec = open_checkpoint(folder).spec
    tp = next(n for n in (2, 3, 1) if spec.kv_heads % n == 0)
    return ["--set", f"model={folder}", "--set", f"tp={tp}", "--set", f"context={spec.context}"]


if __name__ == "__main__":
    try:
        print(shlex.join(flags(sys.argv[1])))
    except (Unavailable, SurgeryError) as error:
        sys.exit(f"fitting: {error}")
