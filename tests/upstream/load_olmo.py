"""Loads what surgery wrote with ai2-olmo: `OLMo.from_checkpoint`.

.cache/upstream/ai2-olmo/bin/python tests/upstream/load_olmo.py CHECKPOINT IDS.pt LOGITS.pt
"""

from __future__ import annotations

import sys

import torch
from olmo.model import OLMo


def main(checkpoint: str, ids: str, out: str) -> None:
    model = OLMo.from_checkpoint(checkpoint, device="cpu")
    with torch.no_grad():
        torch.save(model(torch.load(ids)).logits.float(), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
