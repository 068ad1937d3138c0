"""Loads what surgery wrote with the transformers of this environment: `AutoModelForCausalLM.from_pretrained`.

.cache/upstream/transformers-4.57/bin/python tests/upstream/load_transformers.py FOLDER ...
"""

from __future__ import annotations

from pathlib import Path

import torch
from each import each
from transformers import AutoModelForCausalLM


def load(checkpoint: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, info = model
    if wrong := {k: v for k, v in info.items() if v}:
        raise ValueError(f"names of tensors do not fit: {wrong}")
    return model.eval()(ids).logits


if __name__ == "__main__":
    each(load)
