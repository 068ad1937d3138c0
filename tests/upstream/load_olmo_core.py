"""Loads what surgery wrote with ai2-olmo-core: its config, its model, its `load_model_and_optim_state`.

    .cache/upstream/ai2-olmo-core/bin/python tests/upstream/load_olmo_core.py CHECKPOINT IDS.pt LOGITS.pt

The Triton kernels that permute tokens among experts do not run on a CPU: a plain torch sum stands in for them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import olmo_core.ops.moe as moe_ops
import torch
from make_olmo_core_goldens import Kernels
from olmo_core.distributed.checkpoint import load_model_and_optim_state
from olmo_core.nn.transformer import TransformerConfig


def main(checkpoint: str, ids: str, out: str) -> None:
    moe_ops.kernels = Kernels
    folder = Path(checkpoint)
    config = TransformerConfig.from_dict(json.loads((folder / "config.json").read_text())["model"])
    model = config.build(init_device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)  # whatever is not loaded shows
    load_model_and_optim_state(folder / "model_and_optim", model)
    with torch.no_grad():
        torch.save(model(torch.load(ids)).float(), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
