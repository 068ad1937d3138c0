"""Run a checkpoint of any format for its logits in little memory: the runner that proofs of upcycling use, eagerly.

    models = [prepared(a, own=True), prepared(b, own=False)]
    trace = models[0].run(tokens, room(models, tokens, 256 << 20))

A Hugging Face folder runs by its own config as transformers reads it, anything else by what its format's table says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.formats.base import Checkpoint
from surgery.running import whole as running
from surgery.running.layerwise import empty_model, held_at_once, layer_by_layer, with_family
from surgery.running.loading import explained, own_config, quiet
from surgery.running.rowwise import room_within

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Prepared:
    """A checkpoint and its model without memory."""

    checkpoint: Checkpoint
    model: Any

    def run(self, tokens: torch.Tensor, room: int) -> running.Trace:
        """Logits, and the outputs of whole layers, of tokens [batch, length]."""
        with layer_by_layer(self.model, self.checkpoint, "float32", room=room):
            return running.run(self.model, tokens, outline=True)


def prepared(checkpoint: Checkpoint, own: bool) -> Prepared:
    """`own`: the config is the folder's, read by transformers.  Raises ConfigError if it cannot be run."""
    fitting = with_family(checkpoint)
    config = own_config(checkpoint.path) if own else None
    with explained("transformers cannot run the model", checkpoint.path), quiet():
        return Prepared(fitting, empty_model(fitting, "float32", attention_by="eager", config=config))


def room(models: Sequence[Prepared], tokens: torch.Tensor, memory: int) -> int:
    """What a block of rows may take, in bytes.  Raises UsageError, with the least that is needed, if none is left."""
    kept = max(held_at_once(m.model, m.checkpoint) for m in models) + sum(_seen(m, tokens.numel()) for m in models)
    return room_within(
        memory, kept, "comparing the logits", "without --logits weights and configs are compared in less"
    )


def _seen(one: Prepared, tokens: int) -> int:
    """The logits and what comparing them takes, the outputs of the layers, and a pass over one."""
    spec = one.checkpoint.spec
    wide = max(spec.width, spec.heads * spec.head_dim, spec.ffn, spec.expert_ffn)
    return tokens * (4 * 4 * spec.vocab + 4 * spec.width * (spec.layers + 3) + 4 * 4 * wide)
