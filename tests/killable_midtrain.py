"""A run that trains a tiny model and can be killed, and programs that kill it: see test_midtrain_kill.py.

    python -m tests.killable_midtrain random FOLDER 50     # SIGKILL at random times, resumed until it ends, again
    python -m tests.killable_midtrain calls FOLDER 12      # SIGKILL at system calls of a save, before and after them
    python -m tests.killable_midtrain stops FOLDER         # SIGTERM, SIGUSR1, SIGINT and a limit on file sizes
    python -m tests.killable_midtrain sample FOLDER        # a few of each

Whenever the run has ended, its log, its weights, moments and random state, and its exports must be those of a run that
nobody disturbed.  Children are forked from a process that has imported torch and the model but runs no thread.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers.models.olmoe.modeling_olmoe  # noqa: F401  seconds that each child would take anew

from surgery.errors import SurgeryError
from surgery.midtraining import after_step
from surgery.midtraining.run import midtrain
from surgery.midtraining.run_file import make_run
from surgery.midtraining.selftests import MOVED, TESTS
from tests import tiny
from tests.killing import dies_at, forked
from tests.test_midtrain_loop import record, settings

STOPS = ("SIGTERM", "SIGUSR1", "SIGINT", "full")
SAME = ("metrics.jsonl", "experts.jsonl", "evals.jsonl", "checkpoints/**/*", "export/*/model.safetensors")


def wanted(folder: Path) -> dict[str, Any]:
    """A mixture of experts with dropout, so that randomness matters, that saves, averages and exports."""
    value = settings(folder / "model", folder / "batches.npz", folder / "out", dropout=0.1)
    return value | {
        "checkpoint": {"every": 3, "keep_last": 2, "keep_every": 12},
        "average": {"last": 3, "ema": 0.9, "every": 2},
        "export": [{"to": "hf", "every": 8}],
        "skip_self_tests": [*TESTS, MOVED],
    }


def train(folder: Path) -> None:
    midtrain(make_run(wanted(folder)))


def outcome(folder: Path) -> dict[str, bytes]:
    """What must not depend on how often the run was killed."""
    found = [path for pattern in SAME for path in folder.glob(pattern) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


Whole = tuple[dict[str, bytes], float]


def undisturbed(folder: Path) -> Whole:
    """What the run comes to, and how many seconds it takes."""
    child(lambda: (tiny.save("olmoe", folder / "model", l=2, h=48, f=40, m=16),
                   record(folder / "batches.npz", masked=True, packed=True)))  # fmt: skip
    begun = time.monotonic()
    child(lambda: train(folder))
    seconds, found = time.monotonic() - begun, outcome(folder / "out")
    assert len(found) == 17, sorted(found)
    shutil.rmtree(folder / "out")
    return found, seconds


def child(job: Any) -> None:
    assert os.waitpid(forked(job), 0)[1] == 0


def compare(folder: Path, whole: Whole) -> None:
    wanted, found = whole[0], outcome(folder / "out")
    assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())
    assert [name for name in found if found[name] != wanted[name]] == []
    assert not list((folder / "out").rglob(".*")), "something half-written is left"
    shutil.rmtree(folder / "out")


def random_kills(folder: Path, whole: Whole, kills: int = 50) -> dict[str, int]:
    seconds = whole[1]
    chance, done, ended = random.Random(11), 0, 0
    while done < kills or (folder / "out").exists():
        pid = forked(lambda: train(folder))
        if done < kills:
            time.sleep(chance.random() * seconds)
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert status in (0, signal.SIGKILL), status
        done += status == signal.SIGKILL
        if status == 0:
            compare(folder, whole)
            ended += 1
    return {"kills": done, "ended": ended}


def calls(folder: Path, whole: Whole, count: int = 12) -> dict[str, int]:
    """Kill at some of the system calls that change something, before or after them, then go on to the end."""
    most = folder / "calls"
    child(lambda: (n := dies_at(0, after=False), train(folder), most.write_text(str(n[0]))))
    compare(folder, whole)
    chance, kills = random.Random(13), 0
    for _ in range(count):
        n, after = chance.randrange(1, int(most.read_text())), chance.random() < 0.5
        pid = forked(lambda n=n, after=after: (dies_at(n, after), train(folder)))
        kills += os.waitpid(pid, 0)[1] == signal.SIGKILL
        child(lambda: train(folder))
        compare(folder, whole)
    return {"kills": kills, "calls": int(most.read_text())}


def stops(folder: Path, whole: Whole, names: Sequence[str] = STOPS) -> dict[str, Any]:
    """What the run says that a signal stops in step 7, or that may write no file as large as its checkpoints."""
    told: dict[str, Any] = {}
    for name in names:

        def job(name: str = name) -> None:
            before_saving(7, (lambda: narrow(folder)) if name == "full" else lambda: stop(name))
            try:
                train(folder)
            except SurgeryError as error:
                said = {"error": str(error), "status": getattr(error, "status", 1)}
                (folder / "said").write_text(json.dumps(said))

        child(job)
        ended = json.loads((folder / "out" / "end.json").read_text())
        kept = sorted(p.name for p in (folder / "out" / "checkpoints").iterdir())
        told[name] = {**json.loads((folder / "said").read_text()), "end": ended, "kept": kept}
        child(lambda: train(folder))
        compare(folder, whole)
    return told


def sample(folder: Path, whole: Whole) -> dict[str, Any]:
    found = {"random": random_kills(folder, whole, 2), "calls": calls(folder, whole, 2)}
    return found | {"stops": stops(folder, whole, ("SIGINT", "full"))}


def before_saving(step: int, act: Any) -> None:
    """Do something just before the loop decides whether this step is saved."""
    real = after_step.Saves.__call__

    def call(self: Any, job: Any, state: Any) -> None:
        if state["progress"].step == step:
            act()
        real(self, job, state)

    after_step.Saves.__call__ = call


def stop(name: str) -> None:
    for _ in range(3 if name != "SIGINT" else 1):  # schedulers repeat themselves
        os.kill(os.getpid(), signal.Signals[name])


def narrow(folder: Path) -> None:
    """Let no file become as large as a checkpoint's, once that of step 6 is there, which another thread writes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    while not (written := list((folder / "out" / "checkpoints" / "step000000006").glob("*.safetensors"))):
        time.sleep(0.01)
    size = written[0].stat().st_size // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, place, *rest = sys.argv[1:]
    Path(place).mkdir(parents=True, exist_ok=True)
    program = {"random": random_kills, "calls": calls, "stops": stops, "sample": sample}[mode]
    print(json.dumps(program(Path(place), undisturbed(Path(place)), *map(int, rest))))
