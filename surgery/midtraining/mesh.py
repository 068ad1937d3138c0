"""A small copy of the model under the run's real mesh against one process: are the gradients the same?

    far = apart(job)                     # {"loss": 1.2e-07, "layers.0.mlp.experts.down_proj": 3.1e-07, ...}

The copy has the family, the experts a token, and the way to be divided of the run's model, but two layers and little
width.  Every process computes a pass of its own rows with the divided copy, and of all rows with a whole one; sums that
are made twice, experts that get no gradient and norms that leave something out are far apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from surgery.formats.base import Checkpoint
from surgery.midtraining import parallel
from surgery.midtraining.batching import MicroBatch
from surgery.midtraining.experts import use_experts
from surgery.midtraining.loss import IGNORE
from surgery.midtraining.model import allocate, build, filled
from surgery.midtraining.parallel import World
from surgery.midtraining.precision import Precision
from surgery.midtraining.routers import MLP, Mixture, RouterLog, by_kind, find_mixtures
from surgery.midtraining.sharding import place_of, shard
from surgery.midtraining.step import Objective, gradients
from surgery.model.spec import Spec
from surgery.tensors.fingerprint import Ledger
from surgery.tensors.in_memory import InMemory

if TYPE_CHECKING:
    from surgery.midtraining.loop import Job

HEAD, VOCABULARY, FFN, LENGTH = 16, 160, 48, 24
FP32 = Precision("fp32", "")


def small(spec: Spec, ep: int) -> Spec:
    """A spec of the same kind: two layers, of which one at least has experts if any has."""
    experts = -(-max(spec.top_k + 1, 2 * ep) // ep) * ep if spec.experts else 0
    dense_first = bool(spec.moe_layers)
    sizes = {"layers": 2, "kv_heads": 2, "group": min(spec.group, 2), "head_dim": HEAD, "vocab": VOCABULARY}
    sizes |= {"experts": experts, "width": 2 * min(spec.group, 2) * HEAD}
    if spec.attn_experts:
        sizes |= {"kv_heads": 4, "width": 2 * sizes["width"], "attn_experts": 4, "attn_top_k": min(spec.attn_top_k, 3)}
    sizes |= {name: FFN for name in ("ffn", "expert_ffn", "shared_ffn") if getattr(spec, name)}
    rope = spec.rope and replace(spec.rope, scaling={})
    return spec.replace(**sizes, rope=rope, rope_local=None, windows=(), sparse=None,
                        moe_layers=(1,) if dense_first else ())  # fmt: skip


def apart(job: Job) -> dict[str, float]:
    """How far loss and gradients of the divided copy lie from those of the whole one, relative to their size."""
    source = replace(job.source, spec=small(job.source.spec, job.run.parallel.ep), parts={})
    alone = World(device=job.world.device)
    (whole, theirs), (divided, ours) = _copies(job, source)
    rows = torch.randint(0, VOCABULARY, (2 * job.world.size, LENGTH), generator=torch.Generator().manual_seed(2))
    mine = rows[job.world.rank :: job.world.size]
    said = gradients(divided, [_part(job, mine)], _objective(job, divided, ours), job.world)
    wanted = gradients(whole, [_part(job, rows)], _objective(job, whole, theirs, "loop"), alone)
    found = {"loss": abs(said["loss"] - wanted["loss"]) / abs(wanted["loss"])}
    one = dict(whole.named_parameters())
    norm = parallel.gradient_norm(job.world, list(divided.parameters()))
    plain = parallel.gradient_norm(alone, list(one.values()))
    found["norm of the gradients"] = float((norm - plain).abs() / plain)
    for name, parameter in divided.named_parameters():
        box, grad = tuple(slice(a, b) for a, b in place_of(job.world, parameter).box), one[name].grad
        assert grad is not None
        here = torch.zeros_like(grad[box]) if parameter.grad is None else parallel.local(parameter.grad)
        found[name] = float((here - grad[box]).norm() / grad.norm().clamp(min=1e-12))
    return found


def _copies(job: Job, source: Checkpoint) -> list[tuple[Any, tuple[Mixture, ...]]]:
    """A whole model with random weights, and one that is divided and has the same; each with its mixtures."""
    whole, divided = (build(source, torch.float32, job.world.device) for _ in range(2))
    mixtures = [find_mixtures(model) for model in (whole, divided)]
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in allocate(whole, job.world.device).values():
            tensor.copy_(torch.randn(tensor.shape, generator=chance) * tensor.shape[-1] ** -0.5)
    shard(divided, mixtures[1], job.world, job.run.parallel, FP32)
    weights = {name: InMemory(tensor.detach().cpu()) for name, tensor in whole.state_dict().items()}
    for _ in filled(allocate(divided, job.world.device), weights, Ledger(), job.world):
        pass
    return [(whole, mixtures[0]), (divided, mixtures[1])]


def _objective(job: Job, model: Any, mixtures: Sequence[Mixture], backend: str = "") -> Objective:
    if not mixtures:
        return replace(job.objective, precision=FP32)
    if with_experts := by_kind(mixtures).get(MLP):
        use_experts(model, with_experts, backend or job.choices["experts"])
    return replace(job.objective, precision=FP32, routers=RouterLog(mixtures), telemetry={})


def _part(job: Job, rows: torch.Tensor) -> MicroBatch:
    tokens = rows.to(job.world.device)
    labels = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORE)], 1)
    return MicroBatch(tokens, labels, None, torch.zeros(len(rows), dtype=torch.long), int((labels != IGNORE).sum()))
