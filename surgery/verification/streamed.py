"""Run a checkpoint of any format for its logits in little memory: the runner that proofs of upcycling use, eagerly.

    models = [prepared(a, own=True), prepared(b, own=False)]
    trace = models[0].run(tokens, room(models, tokens, 256 << 20))

A Hugging Face folder runs by its own config as transformers reads it, anything else by what its format's table says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.errors import UsageError
from surgery.formats.base import Checkpoint
from surgery.running import whole as running
from surgery.running.layerwise import empty_model, held_at_once, layer_by_layer, with_family
from surgery.running.loading import explained, own_config, quiet
from surgery.units import human

if TYPE_CHECKING:
    import torch

LEAST = 1 << 20  # bytes of a block of rows: below that a run is all calls and no work
BLOCKS = 2  # of `room`: the one that is computed with, and what reading and multiplying it takes


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
    left = (memory - kept) // BLOCKS
    if left < LEAST:
        least = human((kept + BLOCKS * LEAST) * 1.01)  # not less, however it is rounded
        raise UsageError(
            f"comparing the logits takes at least {least} of memory, {human(memory)} are allowed",
            hint=f"--max-memory {least.replace(' ', '')}; without --logits weights and configs are compared in less",
        )
    return left


def _seen(one: Prepared, tokens: int) -> int:
    """The logits and what comparing them takes, the outputs of the layers, and a pass over one."""
    spec = one.checkpoint.spec
    wide = max(spec.width, spec.heads * spec.head_dim, spec.ffn, spec.expert_ffn)
    return tokens * (4 * 4 * spec.vocab + 4 * spec.width * (spec.layers + 3) + 4 * 4 * wide)
