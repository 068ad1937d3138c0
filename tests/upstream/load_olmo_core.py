"""Loads what surgery wrote with ai2-olmo-core: its config, its model, its `load_model_and_optim_state`.

    .cache/upstream/ai2-olmo-core/bin/python tests/upstream/load_olmo_core.py FOLDER ...

The Triton kernels that permute tokens among experts do not run on a CPU: a plain torch sum stands in for them.
"""

from __future__ import annotations

import json
from pathlib import Path

import olmo_core.ops.moe as moe_ops
import torch
from each import each
from make_olmo_core_goldens import Kernels
from olmo_core.distributed.checkpoint import load_model_and_optim_state
from olmo_core.nn.transformer import TransformerConfig


def load(checkpoint: Path, ids: torch.Tensor) -> torch.Tensor:
    moe_ops.kernels = Kernels
    config = TransformerConfig.from_dict(json.loads((checkpoint / "config.json").read_text())["model"])
    model = config.build(init_device="cpu").eval()
    for parameter in model.parameters():
        parameter.fill_(torch.nan)  # whatever is not loaded shows
    load_model_and_optim_state(checkpoint / "model_and_optim", model)
    return model(ids)


if __name__ == "__main__":
    each(load)
