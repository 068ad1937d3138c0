"""OLMo-core goes on from a checkpoint with its optimizer: its own loader, three more updates by its own optimizer.

    .cache/upstream/ai2-olmo-core/bin/python tests/upstream/continue_olmo_core.py CHECKPOINT OUT.pt trainer|plain

trainer: groups are laid out as its train module does, a record for each weight; plain: as the bare function does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from make_olmo_core_goldens import updated
from olmo_core.distributed.checkpoint import load_model_and_optim_state
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import OptimGroupOverride, SkipStepAdamWConfig


def main(checkpoint: str, out: str, groups: str) -> None:
    folder = Path(checkpoint)
    model = TransformerConfig.from_dict(json.loads((folder / "config.json").read_text())["model"]).build(
        init_device="cpu"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)  # whatever is not loaded shows
    spared = OptimGroupOverride(params=["embeddings.weight"], opts={"weight_decay": 0.3})  # what is not loaded, too
    optimizer = SkipStepAdamWConfig(lr=0.5, weight_decay=0.7, group_overrides=[spared]).build(model)
    flat = groups == "trainer"
    load_model_and_optim_state(folder / "model_and_optim", model, optimizer, flatten_optimizer_state=flat)
    updated(model, optimizer, range(2, 5))
    torch.save(dict(model.state_dict()), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
