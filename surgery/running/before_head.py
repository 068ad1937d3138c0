"""What a model says before its head: hidden states, of which logits are made for some ids at a time.

    run = before_head(checkpoint, tokens, "float32", room=8 << 20)
    run.logits(0, 1000, run.blocks(4 << 20))              # [tokens, 1000], float32 on the CPU
    run.routes[3].chosen                                  # [tokens, top_k] experts of layer 3

The logits of all tokens may take more memory than a layer: here they are never held.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.formats.base import Checkpoint
from surgery.model.spec import Spec
from surgery.running.device import CPU, Device
from surgery.running.layerwise import (
    Route,
    empty_model,
    held_at_once,
    layer_by_layer,
    observed,
    weights_of,
    with_family,
)  # fmt: skip
from surgery.running.loading import explained, logits_divisor, quiet
from surgery.running.rowwise import LEAST, SPARE, Blocks, room_within
from surgery.tensors.lazy import Lazy

if TYPE_CHECKING:
    import torch

HEAD = "lm_head"


@dataclass(frozen=True)
class BeforeHead:
    """A run up to its head: `hidden` [tokens, width] on the device, and the `head` [vocabulary, width], unread."""

    hidden: torch.Tensor
    head: Lazy
    divisor: float
    on: Device
    routes: Mapping[int, Route]

    def blocks(self, room: int) -> Blocks:
        """Memory for rows of its head."""
        return Blocks(room, self.hidden.dtype, self.on)

    def logits(self, start: int, stop: int, blocks: Blocks) -> torch.Tensor:
        """Of all tokens, for these ids: float32 [tokens, stop - start] on the CPU."""
        from torch.nn.functional import linear

        width = self.hidden.shape[1]
        out = linear(self.hidden, blocks.read(self.head, ((start, stop), (0, width)), (stop - start, width)))
        return (out if self.divisor == 1 else out / self.divisor).float().cpu()


def before_head(checkpoint: Checkpoint, tokens: torch.Tensor, dtype: str, on: Device = CPU, *, room: int) -> BeforeHead:
    """One pass over tokens [batch, length] in a dtype, with blocks of weights of at most `room` bytes.

    The family of the Spec says which model of transformers this is.  Raises ConfigError if it cannot run it.
    """
    import torch

    checkpoint, found, routes = with_family(checkpoint), list[torch.Tensor](), dict[int, Route]()

    def keep(hidden: torch.Tensor) -> torch.Tensor:
        found.append(hidden.flatten(0, -2))
        return hidden[..., :1]  # in place of logits, which nobody looks at

    with explained("transformers cannot run the model", checkpoint.path), quiet(), torch.inference_mode():
        model = empty_model(checkpoint, dtype, on)
        head = weights_of(model, checkpoint)[f"{HEAD}.weight"]
        with layer_by_layer(model, checkpoint, dtype, on, room), observed(model, routes):
            getattr(model, HEAD).forward = keep
            model(input_ids=on.holds(tokens), use_cache=False)
        return BeforeHead(found[0], head, logits_divisor(model), on, routes)


def room_for(models: Iterable[Checkpoint], tokens: int, memory: int, what: str, fewer: str = "") -> int:
    """The `room` of runs of these models, one after the other, on so many tokens, that keep within `memory` bytes.

    Raises UsageError, with the least that it takes, and with how many tokens would fit, as `fewer` says it.
    """
    held = each = 0
    for model in map(with_family, models):
        with explained("transformers cannot run the model", model.path), quiet():
            held = max(held, held_at_once(empty_model(model, "float32"), model))
        each = max(each, _of_a_token(model.spec))
    fitting = max(0, (memory - held - SPARE * LEAST) // each)
    return room_within(memory, held + tokens * each, what, fewer and fewer.format(fitting))


def _of_a_token(spec: Spec) -> int:
    """Bytes: its hidden states in three runs, a pass over a layer, its experts' outputs, and two runs' routes."""
    wide = max(spec.width, spec.heads * spec.head_dim, spec.ffn, spec.expert_ffn)
    routes = 2 * spec.layers * (spec.experts + 2 * spec.top_k)
    return 4 * (3 * spec.width + 4 * wide + 3 * spec.top_k * spec.width + routes)
