"""Megatron-core's optimizers go on from states that surgery carried, as the runs that these came from.

    .venv/bin/python -m tests.upstream.optimizer [PYTHON]

PYTHON: one that has megatron-core; by default the environment that `tests.upstream.run` makes.  Megatron trains tiny
models for two updates, saves them in each of its forms, and goes on for three.  What surgery makes of each save, by way
of OLMo-core where that holds the model, is loaded by Megatron's own loaders, and three updates later every weight,
master and moment must be that of the source's own run, bit for bit.  A distrib_optim.pt is also loaded on other numbers
of data-parallel ranks, and what these save again must be the same.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path

import torch

import surgery
from surgery.errors import SurgeryError
from tests import matrix, oracle, tiny
from tests.upstream.run import last, python_for

NAME = "megatron-core"
FAMILIES = ("llama", "qwen2", "mixtral")
WRITTEN: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "plain": ("megatron", {"adam": "torch"}),
    "fused": ("megatron", {"adam": "fused"}),
    "dist": ("megatron-dist", {}),
    "flat": ("megatron", {"optimizer": "distributed"}),
}
PAIRS = (("plain", "plain"), ("fused", "fused"), ("dist", "dist"), ("flat", "dist"), ("dist", "flat"), ("flat", "flat"))
RANKS = (1, 3)  # data-parallel ranks that a state for any number of them is loaded on besides


def script(python: str, *words: object) -> str:
    """Why Megatron failed; "" if it did not."""
    path = Path(__file__).with_name("load_megatron_optimizer.py")
    try:
        run = subprocess.run(
            [python, "-W", "ignore", str(path), *map(str, words)], capture_output=True, text=True, timeout=600
        )
    except subprocess.TimeoutExpired:
        return "Megatron: took more than ten minutes"
    return f"Megatron: {last(run.stderr)}" if run.returncode else ""


def differences(want: Path, got: Path) -> str:
    """Where two runs differ, at the start or after three updates."""
    for one in sorted(want.parent.glob(f"{want.name}.*")):
        a, b = (torch.load(p, weights_only=True) for p in (one, got.with_name(f"{got.name}{one.suffix}")))
        for when in ("start", "later"):
            if a[when].keys() != b[when].keys():
                return f"{when}: other parameters"
            if bad := [f"{name}.{role}" for name, held in a[when].items() for role, t in held.items()
                       if not oracle.same_bits(t, b[when][name][role])]:  # fmt: skip
                return f"{when}: {len(bad)} tensors differ, {bad[0]} first"
    return ""


def results(python: str, family: str, folder: Path) -> Iterator[tuple[str, str]]:
    """(what, why it is wrong) of every pair of forms; the source's files and runs are made once."""
    source = tiny.save(family, folder / "hf", "bfloat16")
    surgery.convert(source, folder / "start", to="megatron", options={"spec": "local"}, sync=False)
    failed = {}
    for kind in ("plain", "fused", "flat", "dist"):
        failed[kind] = script(python, "begin", folder / "start", kind, folder / kind, folder / f"{kind}.pt")
    ways = ("", *("olmo-core" for name in matrix.HOLDS[family] if name == "olmo-core"))
    for (kind, to), by in product(PAIRS, ways):
        what = f"{family}: {kind} to {to}{f' by way of {by}' if by else ''}"
        yield what, failed[kind] or went_on(python, folder, kind, to, by)


def went_on(python: str, folder: Path, kind: str, to: str, by: str) -> str:
    """Convert the save of one form into another, and let Megatron go on from it; "" or what is wrong."""
    source, out, state = folder / kind, folder / f"{kind}-{to}-{by}", folder / f"{kind}-{to}-{by}.pt"
    form, options = WRITTEN[to]
    try:
        if by:
            surgery.convert(source, folder / f"{kind}-{by}", to=by, optimizer=True, sync=False, force=True)
            source = folder / f"{kind}-{by}"
        surgery.convert(source, out, to=form, options={"spec": "local", **options}, optimizer=True, dtype="bf16",
                        sync=False)  # fmt: skip
    except SurgeryError as error:
        return str(error)
    why = script(python, "go-on", out, to, state) or differences(folder / f"{kind}.pt", state)
    return why or (saved_again(python, out, folder / "again.pt") if to == "flat" else "")


def saved_again(python: str, run: Path, again: Path) -> str:
    """Load distrib_optim.pt on other numbers of ranks and save it again: it must be the same; "" or what differs."""
    ours = torch.load(next(run.rglob("distrib_optim.pt")), weights_only=True)
    for ranks in RANKS:
        if why := script(python, "again", run, "flat", again, ranks):
            return f"on {ranks} ranks: {why}"
        theirs = torch.load(again, weights_only=True)
        for key, fields in ours[0].items():
            if bad := [name for name, value in fields.items() if not torch.equal(
                torch.as_tensor(value), torch.as_tensor(theirs[0][key][name]))]:  # fmt: skip
                return f"on {ranks} ranks: {bad[0]} is another"
    return ""


def main(python: str | None = None) -> int:
    python = python or python_for(NAME)
    if python is None:
        return 1
    counts = {"ok": 0, "FAIL": 0}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as tmp:
            for what, why in results(python, family, Path(tmp)):
                counts["FAIL" if why else "ok"] += 1
                print(f"{'FAIL' if why else 'ok':4}  {what}{': ' if why else ''}{why}", flush=True)
    print(f"{counts['ok']} go on as their source, {counts['FAIL']} do not")
    return int(counts["FAIL"] > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
