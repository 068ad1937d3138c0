"""Checkpoint surgery: convert, inspect and verify large-language-model checkpoints.

    import surgery

    surgery.convert("Llama-2-7b", "Llama-2-7b-hf", to="hf")
    surgery.open_checkpoint("Llama-2-7b").parts["layers.0.attn.q"][:4]     # four rows, nothing else is read
    surgery.convert("Llama-2-7b-hf", "Llama-2-7b-tp2", to="meta", tp=2, max_memory="1GB")      # keywords are the flags
    surgery.verify("Llama-2-7b", "Llama-2-7b-hf").verdict                  # "the same model"
    surgery.soup("merge_configs/three-seeds.yaml", "merged", to="meta")    # mergekit's YAML, models in any format
    surgery.upcycle("SmolLM2", "SmolLM2-moe", experts=64, top_k=8).proof.verdict     # "exact"
    surgery.experts("SmolLM2-moe", "larger", duplicate=2)                  # change the experts of a mixture
    surgery.collapse("SmolLM2-moe", "dense")                               # and the way back
    surgery.save_checkpoint(model, "edited", parts={"embed": tensor})      # of a model that was opened
    surgery.push("edited", "s3://bucket/edited")                           # to a bucket, whole or not at all
    surgery.pull("s3://bucket/edited", "here")                             # and from one, or from the hub
    surgery.describe("something").what                                     # whatever it is
    surgery.open_tensors("model.safetensors")["lm_head.weight"].shape      # stored names, no model knowledge

Everything bad that a file or a flag can be raises `surgery.SurgeryError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.containers import open_tensors
    from surgery.conversion.convert import convert
    from surgery.conversion.saving import save_checkpoint
    from surgery.errors import SurgeryError
    from surgery.formats.registry import describe, open_checkpoint
    from surgery.formats.topology import Topology
    from surgery.merging.run import soup
    from surgery.storage.pull import pull
    from surgery.storage.push import push
    from surgery.upcycling.api import collapse, experts, upcycle
    from surgery.verification import verify

__version__ = "0.2.0.dev0"

__all__ = [
    "SurgeryError", "Topology", "collapse", "convert", "describe", "experts", "open_checkpoint", "open_tensors", "pull",
    "push", "save_checkpoint", "soup", "upcycle", "verify",
]  # fmt: skip

_WHERE = {
    "SurgeryError": ("surgery.errors", "SurgeryError"),
    "Topology": ("surgery.formats.table", "Topology"),
    "collapse": ("surgery.upcycling.api", "collapse"),
    "convert": ("surgery.conversion.convert", "convert"),
    "describe": ("surgery.formats.registry", "describe"),
    "experts": ("surgery.upcycling.api", "experts"),
    "open_checkpoint": ("surgery.formats.registry", "open_checkpoint"),
    "open_tensors": ("surgery.containers", "open_tensors"),
    "pull": ("surgery.storage.pull", "pull"),
    "push": ("surgery.storage.push", "push"),
    "save_checkpoint": ("surgery.conversion.saving", "save_checkpoint"),
    "soup": ("surgery.merging.run", "soup"),
    "upcycle": ("surgery.upcycling.api", "upcycle"),
    "verify": ("surgery.verification", "verify"),
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import surgery` costs nothing."""
    if name not in _WHERE:
        raise AttributeError(f"module 'surgery' has no attribute {name!r}")
    import importlib

    module, attribute = _WHERE[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    """What there is to call."""
    return [*__all__, "__doc__", "__version__"]
