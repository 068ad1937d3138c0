"""A conversion-like job that can be killed, and programs that kill it: see test_kill.py.

    python killable.py random FOLDER 60        # SIGKILL at random times, resumed until it ends, 60 kills in all
    python killable.py calls FOLDER            # SIGKILL before and after every system call that changes something
    python killable.py plain FOLDER            # the same where the system cannot exchange two folders
    python killable.py stops FOLDER            # SIGINT, SIGTERM and a limit on file sizes, each resumed

Children are forked from a process that has imported torch but runs no thread: a run takes a fraction of a second.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from surgery.containers.output import text_file
from surgery.containers.safetensors import safetensors_file
from surgery.containers.torch_writer import torch_file
from surgery.errors import SurgeryError
from surgery.tensors.extent import Extent
from surgery.tensors.files import File
from surgery.tensors.fingerprint import Ledger
from surgery.tensors.lazy import Concat, Slice, bytes_of
from surgery.writing import renaming, stream
from tests.killing import dies_at, forked, tree


def source(folder, rows):
    """Three files, ten tensors of `rows` x 1000 bfloat16 in each."""
    torch.manual_seed(1)
    parts = {}
    for i in range(3):
        path = folder / f"source{i}"
        if not path.exists():
            path.write_bytes(bytes(bytes_of(torch.randint(0, 256, (rows * 20_000,), dtype=torch.uint8))))
        parts |= {f"{i}.{j}": Extent(File(path), j * rows * 2000, (rows, 1000), "bfloat16") for j in range(10)}
    return parts


def run(folder, rows, memory, dst="out", force=False):
    """The job: copies, swapped halves and columns, into four files, and a record of the fingerprints."""
    ledger, half = Ledger(), rows // 2
    names = [f"{i}.{j}" for i in range(3) for j in range(2 if rows < 10 else 10)]
    parts = source(folder, rows)
    p = {name: ledger.tap(name, parts[name]) for name in names}

    def halves(name, dim, at, n):
        return Concat([Slice(p[name], dim, at, n), Slice(p[name], dim, 0, at)], dim)

    files = [
        safetensors_file("a.safetensors", {n: p[n] for n in p if n[0] == "0"}),
        torch_file("rank/b.pt", {n: halves(n, 0, half, rows) for n in p if n[0] == "1"}),
        safetensors_file("c.safetensors", {n: halves(n, 1, 300, 1000) for n in p if n in ("2.0", "2.2", "2.3")}),
        torch_file("d.pt", {n: p[n] for n in p if n[0] == "2" and n not in ("2.0", "2.2", "2.3")}),
        text_file("config.json", b"{}"),
    ]

    def closing(done):
        record = {
            "output": {"files": [f.name for f in files]},
            "content": [ledger.content_digest(), sorted(ledger.counts.items())],
        }
        return [text_file("surgery.json", json.dumps(record).encode())]

    return stream.write(
        files, folder / dst, max_memory=memory, job={"rows": rows}, ledger=ledger, closing=closing, force=force
    )


def random_kills(folder, kills, rows=300, memory=32 << 17):
    """Kill at random times; whenever the output appears, compare it and start again."""
    started = time.monotonic()
    os.waitpid(forked(lambda: run(folder, rows, memory, "whole")), 0)
    whole, span, chance = tree(folder / "whole"), time.monotonic() - started, random.Random(7)
    done = resumed = 0
    while done < kills:
        pid = forked(lambda: run(folder, rows, memory))
        time.sleep(chance.random() * span * 0.6)
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert status in (0, signal.SIGKILL), status
        done += status == signal.SIGKILL
        if (folder / "out").exists():
            assert tree(folder / "out") == whole, "an output that is not complete"
            shutil.rmtree(folder / "out")
            resumed += 1
    result = run(folder, rows, memory)
    assert tree(folder / "out") == whole
    assert not (folder / ".out.surgery-partial").exists()
    return {"kills": done, "completed": resumed + 1, "last_resumed": result.resumed_bytes}


def kill_at_every_call(folder, rows=4, memory=32 << 12, exchange=True, first=1):
    """With --force over an older output: until the new one is in place, the old one must not be lost."""
    run(folder, rows, memory, "whole")
    whole, old = tree(folder / "whole"), {"model.safetensors": b"old"}
    out, hidden = folder / "out", folder / ".out.surgery-partial"
    kills = resumed = 0
    for after in (False, True):
        for n in range(first, 10_000):
            (out).mkdir()
            (out / "model.safetensors").write_bytes(b"old")

            def job(n=n, after=after):
                if not exchange:
                    renaming._renameat2 = lambda *args: False
                dies_at(n, after)
                run(folder, rows, memory, force=True)

            status = os.waitpid(forked(job), 0)[1]
            if status == 0:
                break
            assert status == signal.SIGKILL, status
            kills += 1
            there = tree(out) if out.exists() else None
            assert there in (old, whole) or (there is None and tree(hidden / "old") == old), (n, after, there)
            result = run(folder, rows, memory, force=True)
            resumed += result.resumed_bytes > 0
            assert tree(out) == whole, (n, after)
            assert not hidden.exists(), (n, after)
            shutil.rmtree(out)
        else:
            raise AssertionError("it never ends")
        shutil.rmtree(out)
    return {"kills": kills, "resumed": resumed}


def kill_without_exchange(folder):
    """As `kill_at_every_call` where the system cannot exchange two folders: from the last writes on."""
    return kill_at_every_call(folder, exchange=False, first=60)


def stops(folder, rows=500, memory=32 << 17):
    """What a run says that is stopped by a signal, or by a limit on file sizes, and how much the next one resumes."""
    outcome = {}
    for why in ("SIGINT", "SIGTERM", "FSIZE"):

        def job(why=why):
            if why == "FSIZE":
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (9_999_999, 9_999_999))
            else:
                slowly()
            try:
                run(folder, rows, memory)
            except SurgeryError as error:
                said = {"error": str(error), "signum": getattr(error, "signum", 0)}
                (folder / "said").write_text(json.dumps(said))

        pid = forked(job)
        if why != "FSIZE":
            while not (folder / "begun").exists():
                time.sleep(0.005)
            os.kill(pid, signal.Signals[why])
        assert os.waitpid(pid, 0)[1] == 0
        assert not (folder / "out").exists()
        result = run(folder, rows, memory)
        outcome[why] = json.loads((folder / "said").read_text()) | {"resumed": result.resumed_bytes}
        shutil.rmtree(folder / "out")
        (folder / "said").unlink()
        (folder / "begun").unlink(missing_ok=True)
    return outcome


def slowly():
    """Make writing slow, and a file `begun` when twenty blocks are written."""
    real, count = os.pwrite, [0]

    def pwrite(*args):
        count[0] += 1
        if count[0] == 20:
            Path(sys.argv[2], "begun").touch()
        time.sleep(0.01)
        return real(*args)

    os.pwrite = pwrite


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, folder = sys.argv[1], Path(sys.argv[2])
    if mode == "random":
        outcome = random_kills(folder, int(sys.argv[3]))
    else:
        outcome = {"calls": kill_at_every_call, "plain": kill_without_exchange, "stops": stops}[mode](folder)
    print(json.dumps(outcome), flush=True)
