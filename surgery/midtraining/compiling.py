"""torch.compile for a model in training: its layers, each by itself, as they are all alike.

note = compiled(model, "auto", device="cpu", seconds=3600, dense=True)       # "" if nothing was compiled

A layer is compiled once and serves all.  Of a layer with experts only the attention is: routers are listened to, and
the number of tokens of an expert is another one at every step.  Where the attention has experts, nothing is.
"""

from __future__ import annotations

import shutil
from typing import Any

from surgery.midtraining.attention_experts import HeadRouter

LONG = 20 * 60  # seconds of a run from which compiling, a minute or two on a CPU, pays


def compiled(model: Any, wanted: bool | str, *, device: str, seconds: float, dense: bool) -> str:
    """Compile the layers in place if that is wanted; for "auto", if it pays.  Says what was done.

    seconds   that the run takes without it
    """
    if wanted == "auto":
        wanted = device != "cpu" or (dense and seconds > LONG and shutil.which("g++") is not None)
    if not wanted or any(isinstance(module, HeadRouter) for module in model.modules()):
        return ""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            (layer if dense else layer.self_attn).compile(dynamic=False)
    what = "layers" if dense else "the attention of the layers"
    return f"torch.compile for {what}"
