"""Loads what surgery wrote with ai2-olmo: `OLMo.from_checkpoint`.

.cache/upstream/ai2-olmo/bin/python tests/upstream/load_olmo.py FOLDER ...
"""

from __future__ import annotations

from pathlib import Path

import torch
from each import each
from olmo.model import OLMo


def load(checkpoint: Path, ids: torch.Tensor) -> torch.Tensor:
    return OLMo.from_checkpoint(str(checkpoint), device="cpu")(ids).logits


if __name__ == "__main__":
    each(load)
