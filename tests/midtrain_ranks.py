"""Runs in several processes, forked from one that imported all they need but runs no thread (test_midtrain_ranks.py).

    python -m tests.midtrain_ranks FOLDER few      # prints, as JSON, how far some runs of 8 steps lie from one process
    python -m tests.midtrain_ranks FOLDER two      # all of them, and 20 steps
    python -m tests.midtrain_ranks FOLDER four     # in four processes instead of two
    python -m tests.midtrain_ranks FOLDER heads    # with experts in the attention, too

They train a tiny mixture of experts with masks and packed rows; the chains are stopped by a signal on the way, and go
on in another number of processes, or divided in another way.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.fsdp
import transformers.distributed
import transformers.models.mixtral.modeling_mixtral
import transformers.models.olmoe.modeling_olmoe  # noqa: F401  seconds that each child would take anew
from safetensors.torch import load_file

import surgery
from surgery.errors import MismatchError
from surgery.midtraining import after_step, mesh, sharding
from surgery.midtraining.checkpoint import newest
from surgery.midtraining.parallel import World
from surgery.midtraining.run import midtrain
from surgery.midtraining.run_file import make_run
from surgery.writing.interrupt import Requeue
from tests import tiny
from tests.killing import forked
from tests.test_midtrain_loop import ROWS, record, settings

Stage = tuple[int, int | None, dict[str, Any]]  # so many processes, up to which step, with which settings
Chains = Mapping[str, Sequence[Stage]]
KEYS = ("loss", "ce", "balance", "router_z", "grad_norm")
EP: dict[str, Any] = {"parallel": {"ep": 2}}
COPIES: dict[str, Any] = {"parallel": {"replicate": 2}}
FEW: Chains = {
    "ep": [(2, None, EP)],
    "ep, stopped": [(2, 3, EP), (2, None, EP)],
    "2 -> 1 -> copies -> ep": [(2, 2, {}), (1, 4, {}), (2, 6, COPIES), (2, None, EP)],
}
TWO: Chains = {
    "fsdp": [(2, None, {})],
    "replicate": [(2, None, COPIES)],
    "ep": [(2, None, EP)],
    "ep, stopped": [(2, 7, EP), (2, None, EP)],
    "2 -> 1 -> 2": [(2, 7, {}), (1, 12, {}), (2, None, {})],
    "ep -> fsdp -> ep": [(2, 6, EP), (2, 13, {}), (2, None, EP)],
}
FOUR: Chains = {
    "fsdp 4": [(4, None, {})],
    "ep 4": [(4, None, {"parallel": {"ep": 4}})],
    "ep 2 x fsdp 2": [(4, None, EP)],
    "replicate 2 x fsdp 2": [(4, None, COPIES)],
    "4 -> 1 -> ep 4": [(4, 7, {}), (1, 12, {}), (4, None, {"parallel": {"ep": 4}})],
}
HEADS: Chains = {"fsdp": [(2, None, {})], "2 -> 1 -> copies": [(2, 2, {}), (1, 5, {}), (2, None, COPIES)]}


def ranks(count: int, job: Callable[[], None]) -> None:
    """Do the job in so many processes that find each other; raises if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(rank: int) -> None:
        if count > 1:
            told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in told.items()}, MASTER_ADDR="127.0.0.1")
        torch.set_num_threads(1)
        try:
            job()
        except BaseException:
            traceback.print_exc()
            raise

    left = {forked(lambda rank=rank: one(rank)) for rank in range(count)}
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if status:
            time.sleep(1)
            for other in left:
                os.kill(other, signal.SIGKILL)
            raise SystemExit(f"a process ended with status {status}")


def train(folder: Path, name: str, stage: Stage, rows: int = 2) -> None:
    """One stage: stopped by a signal to the first process alone, unless it is the last one.

    One process computes `rows` at once, several one row each.
    """
    real, (count, until, more) = after_step.Saves.__call__, stage

    def call(self: Any, job: Any, state: Any) -> None:
        if state["progress"].step == until and job.world.main:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, job, state)

    value = settings(folder / "model", folder / "batches.npz", folder / name, micro_batch=1 if count > 1 else rows)
    value |= {"checkpoint": {"every": 5}, "average": {"last": 3}, "train": value["train"] | {"z_loss": 1e-3}, **more}
    after_step.Saves.__call__ = call
    try:
        midtrain(make_run(value))
    except Requeue:
        assert until


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def apart(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> float:
    assert [m["step"] for m in one] == [m["step"] for m in other]
    return max(abs(a[key] - b[key]) / abs(a[key]) for a, b in zip(one, other, strict=True) for key in KEYS)


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    saved = newest(folder / name / "checkpoints", World()).saved
    assert saved and saved.step == len(lines(folder, name))
    found = {n: t.full() for n, t in saved.tensors.items() if not n.startswith(("rng.", "readings."))}
    exported = next((folder / name / "export").glob("*-hf"))
    return found | {f"export.{n}": t for n, t in load_file(exported / "model.safetensors").items()}


def planted(folder: Path) -> None:
    """What the test of the mesh says where every gradient is half of what it should be."""
    real = sharding.shard

    def shard(*args: Any) -> None:
        real(*args)
        for module in args[0].modules():
            if isinstance(module, torch.distributed.fsdp.FSDPModule):
                module.set_gradient_divide_factor(2.0)

    mesh.shard = shard
    try:
        train(folder, "planted", (2, None, EP))
    except MismatchError as error:
        (folder / f"said-{os.environ['RANK']}").write_text(str(error))


def olmoe(folder: Path) -> None:
    tiny.save("olmoe", folder, l=2, h=48, f=40, m=16, e=8)


def heads(folder: Path) -> None:
    """Two of four groups of heads, and two of four experts."""
    tiny.save("llama", folder.with_name("dense"), l=2, h=48, f=40)
    surgery.upcycle(folder.with_name("dense"), folder, attention_experts=4, attention_top_k=2, experts=4, top_k=2,
                    strategy="copy", force_lossy=True, verify_tokens=0)  # fmt: skip


def main(
    folder: Path, chains: Chains, steps: int, size: int = 2, rows: int = ROWS, make: Callable[[Path], None] = olmoe
) -> dict[str, Any]:
    """How far the last metrics, weights and moments of each chain lie from those of one process, relatively.

    The router losses are those of the rows that all processes have at once, `size`, of the `rows` of a step.
    """
    ranks(1, lambda: (make(folder / "model"),
                      record(folder / "batches.npz", masked=True, packed=True, steps=steps, rows=rows)))  # fmt: skip
    ranks(1, lambda: train(folder, "one", (1, None, {}), size))
    said: dict[str, Any] = {}
    one, whole = lines(folder, "one"), weights(folder, "one")
    assert len(one) == steps
    for name, stages in chains.items():
        for stage in stages:
            ranks(stage[0], lambda s=stage, n=name: train(folder, n, s, size))
        found = weights(folder, name)
        assert found.keys() == whole.keys()
        far = {n: float((t - whole[n]).norm() / whole[n].norm().clamp(min=1e-30)) for n, t in found.items()}
        said[name] = {"metrics": apart(one, lines(folder, name)), "state": max(far.values())}
    return said


def of_two(folder: Path, chains: Chains, steps: int) -> dict[str, Any]:
    """Also whether a run that was stopped has the same bits, and what the self-test says of wrong gradients."""
    said = main(folder, chains, steps)
    same = [(folder / name / "metrics.jsonl").read_bytes() for name in ("ep", "ep, stopped")]
    a, b = weights(folder, "ep"), weights(folder, "ep, stopped")
    said["the same bits"] = same[0] == same[1] and all(torch.equal(a[n], b[n]) for n in a)
    ranks(2, lambda: planted(folder))
    said["planted"] = [(folder / f"said-{rank}").read_text() for rank in range(2)]
    return said


if __name__ == "__main__":
    where, how = Path(sys.argv[1]), sys.argv[2]
    wanted = {"few": lambda: of_two(where, FEW, 8), "two": lambda: of_two(where, TWO, 20),
              "four": lambda: main(where, FOUR, 20, 4, 8),
              "heads": lambda: main(where, HEADS, 8, make=heads)}  # fmt: skip
    print(json.dumps(wanted[how]()))
