"""Megatron-core reads the token files of surgery, and draws from them what surgery says that it draws.

    .venv/bin/python -m tests.upstream.data [PYTHON]

PYTHON: one that has megatron-core; by default the environment that `tests.upstream.run` makes.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from surgery.data.files.idx import IndexedWriter
from surgery.data.payload_index import index_payload
from surgery.data.trainers.megatron_run import open_megatron
from tests.upstream.run import ROOT, last, python_for

NAME = "megatron-core"
DOLMA = ROOT / "tests" / "golden" / "tokenize" / "dolma" / "part-0-00000.npy"


def make(folder: Path) -> dict[str, list[list[int]]]:
    """Three corpora, by prefix: two that are written, and dolma's payload with an index of ours."""
    rng, made = np.random.default_rng(5), {}
    for name, dtype, count in (("web", "uint16", 150), ("math", "int32", 40)):
        held = [rng.integers(1, 900, int(n)).tolist() for n in rng.integers(1, 60, count)]
        with IndexedWriter(folder / name, dtype) as writer:
            for document in held:
                writer.add(document)
        made[str(folder / name)] = held
    index_payload(DOLMA, to=folder / "dolma")
    with gzip.open(DOLMA.with_suffix(".csv.gz"), "rt") as rows:
        ends = [int(row[1]) for row in csv.reader(rows)]
    held = [part.tolist() for part in np.split(np.fromfile(DOLMA, np.uint16), ends[:-1])]
    return made | {str(folder / "dolma" / DOLMA.stem): held}


def cases(prefixes: list[str]) -> list[dict[str, Any]]:
    """Settings of every kind, drawn with a fixed seed."""
    rng, found = random.Random(7), []
    for number in range(24):
        chosen = rng.sample(prefixes, rng.randrange(1, len(prefixes) + 1))
        weighted = len(chosen) > 1 and number % 3 > 0
        data = [x for p in chosen for x in ((rng.choice([0.2, 0.5, 1.0, 3.0]), p) if weighted else (p,))]
        split = rng.choice(["100,0,0", "90,8,2", "60,40,0"])
        one_pass = not weighted and len(chosen) > 1
        samples = None if one_pass else rng.randrange(5, 400)
        length, seed = rng.choice([8, 17, 32]), rng.randrange(1, 10_000)
        found.append({"data": data, "samples": samples, "sequence_length": length, "seed": seed, "split": split})
    return found


def wrong(case: dict[str, Any], want: dict[str, Any], folder: Path) -> str:
    """What surgery has otherwise; "" if nothing."""
    path = folder / "run.yaml"
    path.write_text(json.dumps({"megatron": {**case, "rows_per_step": 1, "pad_id": 999}}))
    batches = open_megatron(path)
    if len(batches) != want["samples"]:
        return f"{len(batches)} samples in place of {want['samples']}"
    bad = [i for i, tokens in enumerate(want["tokens"]) if batches.rows(i).tokens[0].tolist() != tokens]
    return f"samples {bad} differ" if bad else ""


def main(python: str | None = None) -> int:
    python = python or python_for(NAME)
    if python is None:
        return 1
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        made, script = make(folder), Path(__file__).with_name("load_megatron_data.py")
        held = cases(list(made))
        (folder / "cases.json").write_text(json.dumps(held))
        words = [python, "-W", "ignore", str(script), str(folder / "cases.json"), str(folder / "out.json")]
        run = subprocess.run(words, capture_output=True, text=True, timeout=900)
        if run.returncode:
            print(f"FAIL  {NAME}: {last(run.stderr)}")
            return 1
        want = json.loads((folder / "out.json").read_text())
        results = {
            f"documents of {Path(p).name}": "" if made[p] == want["documents"][p] else "they differ" for p in made
        }
        pairs = zip(held, want["cases"], strict=True)
        results |= {f"{n}: {case}": wrong(case, found, folder) for n, (case, found) in enumerate(pairs)}
    for what, why in results.items():
        print(f"{'FAIL' if why else 'ok':4}  {what}{': ' if why else ''}{why}")
    print(f"{len(results) - sum(map(bool, results.values()))} of {len(results)} are the same")
    return int(any(results.values()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
