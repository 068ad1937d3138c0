"""Two gloo processes against one: experts and routers of a model that is sharded (FSDP2), or has its experts divided.

This file is the test and what each process runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

IDS = torch.randint(0, 264, (4, 12), generator=torch.Generator().manual_seed(5))
ROOT = Path(__file__).resolve().parent.parent


def summed(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def step(model, backend, ids):
    """Loss and whole gradients of a model with router losses, f being of all ranks."""
    from surgery.midtraining.balance import balance_loss, router_z_loss
    from surgery.midtraining.experts import fastest_experts, use_experts
    from surgery.midtraining.router_telemetry import RouterTelemetry
    from surgery.midtraining.routers import RouterLog, find_mixtures

    mixtures = find_mixtures(model)  # of a sharded model, too
    assert backend in fastest_experts(mixtures[0], tokens=20, rounds=1).milliseconds
    use_experts(model, mixtures, backend)
    with RouterLog(mixtures) as log:
        loss = model(ids, labels=ids, use_cache=False).loss
    routed = log.take()
    telemetry = RouterTelemetry([m.layer for m in mixtures])
    telemetry.add(routed)
    loss = loss + 0.1 * balance_loss(routed, reduce=summed) + 0.01 * router_z_loss(routed)
    loss.backward()
    grads = {n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for n, p in model.named_parameters()}
    return grads, telemetry.read(summed)


def sharded(folder):
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def divided(folder):
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    both = DistributedConfig(fsdp_size=2, ep_size=2)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=both)


def doubled(model):
    """Losses with twice the weights standing in, and before and after."""
    from surgery.midtraining.averages import standing_in
    from surgery.midtraining.model import weights_now

    def loss():
        return float(model(IDS, labels=IDS, use_cache=False).loss)

    with torch.no_grad():
        found = [loss()]
        with standing_in(model, {name: 2 * tensor for name, tensor in weights_now(model, {}).items()}):
            found.append(loss())
        return [*found, loss()]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for build, backend in ((sharded, "padded"), (divided, "grouped_mm")):
        model = build(folder)
        (folder / f"{build.__name__}-{dist.get_rank()}").write_text(json.dumps(doubled(model)))
        grads, reading = step(model, backend, IDS.chunk(2)[dist.get_rank()])
        if dist.get_rank() == 0:
            torch.save((grads, reading["load"]), folder / f"{build.__name__}.pt")
    dist.barrier()


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path):
    from tests import tiny

    folder = tiny.save("olmoe", tmp_path, l=2)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    words = [sys.executable, __file__, str(folder)]
    run = subprocess.run(words, capture_output=True, text=True, env=env, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    whole = tiny.model("olmoe", l=2)
    losses = doubled(whole)
    assert losses[0] == losses[2] != losses[1]
    want, reading = step(whole, "loop", IDS)
    for way in ("sharded", "divided"):
        for rank in (0, 1):
            found = json.loads((folder / f"{way}-{rank}").read_text())
            assert found[0] == found[2] and found == pytest.approx(losses, rel=1e-5)
        got, load = torch.load(folder / f"{way}.pt", weights_only=True)
        assert load == [pytest.approx(x) for x in reading["load"]]
        assert got.keys() == want.keys()
        assert {n: d for n in want if (d := float((got[n] - want[n]).norm() / want[n].norm())) > 5e-6} == {}


if __name__ == "__main__":
    from tests.midtrain_ranks import ranks

    ranks(2, lambda: main(Path(sys.argv[1])))
