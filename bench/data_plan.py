"""Time and memory of `surgery data plan` for 50B tokens, and the speed of reading random rows from page cache.

    python bench/data_plan.py --dir /big/disk/tmp

Planning: three sources of 180B, 18B and 11B tokens (sparse files: no data, but whole indexes of 52 million documents
in all), 50B tokens at 4096.  `peak` is less that of a process that only imports the modules.

Reading: random rows of 4096 from a file of random ids that was just written, for each dtype: the ids alone, and whole
rows (ids as int64, labels, positions that restart at every document).  GB/s are bytes of the file, per second of the
processor, which other programs' load disturbs least; nothing waits for a disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from timing import Result, timed

LENGTH, DOCUMENT = 4096, 4000
SOURCES = {"web": (180_000_000_000, 0.5), "code": (18_000_000_000, 0.3), "math": (11_000_000_000, 0.2)}
IMPORTS = "import surgery.cli.main, surgery.data.plans.plan, surgery.cli.show_data"


def make(root: Path) -> None:
    """The sources and their mixture."""
    import numpy as np

    from surgery.data.files.idx import write_index

    for name, (tokens, _) in SOURCES.items():
        with open(root / f"{name}.bin", "wb") as file:
            file.truncate(2 * (tokens // DOCUMENT) * DOCUMENT)
        write_index(root / f"{name}.idx", "uint16", np.full(tokens // DOCUMENT, DOCUMENT, np.int32))
    sources = [{"name": n, "paths": f"{n}.bin", "weight": w, "holdout": 1000} for n, (_, w) in SOURCES.items()]
    mixture = {"sequence_length": LENGTH, "budget": {"tokens": 50e9}, "rows_per_step": 1024, "sources": sources}
    (root / "mix.yaml").write_text(json.dumps(mixture))  # which is YAML


def planning(root: Path, runs: int) -> None:
    imports, result = Result(), Result()
    command = [sys.executable, "-m", "surgery", "data", "plan", str(root / "mix.yaml"), str(root / "plan"), "--json"]
    for _ in range(runs):
        timed([sys.executable, "-c", IMPORTS], imports)
        found = json.loads(timed([*command, "--force"], result))
    best, size = min(result.wall), (root / "plan" / "order.u64").stat().st_size
    peak = (min(result.peak) - min(imports.peak)) / 1e6
    cpu = f"{min(result.cpu):.1f} s of the processor"
    print(f"plan: {found['instances']:,} instances, {best:.1f} s ({cpu}), of them {min(imports.wall):.1f} s imports")
    print(f"      peak {peak:.0f} MB beyond the imports; the order has {size / 1e6:.0f} MB")


def reading(root: Path, megabytes: int, rows: list[int]) -> None:
    import numpy as np

    from surgery.data.files.idx import IndexedWriter
    from surgery.data.plans.batches import Batches
    from surgery.data.plans.draft import draft_plan
    from surgery.data.plans.plan import write_plan

    for dtype in ("uint16", "int32"):
        rng, size = np.random.default_rng(0), np.dtype(dtype).itemsize
        with IndexedWriter(root / "read", dtype) as writer:
            for _ in range(megabytes * 10**6 // size // DOCUMENT):
                writer.add(rng.integers(0, 50_000, DOCUMENT, np.uint16))
        source = {"name": "read", "paths": "read.bin", "weight": 1}
        mixture = {"sequence_length": LENGTH, "budget": {"epochs": 2}, "sources": [source]}
        (root / "read.yaml").write_text(json.dumps(mixture))
        plan = write_plan(draft_plan(root / "read.yaml"), root / "reading", force=True)
        for n in rows:
            batches = Batches(plan, n)
            starts = [batches.rows(step).instance * LENGTH for step in range(len(batches))]
            ids = seconds(lambda step: plan.sources[0].windows(starts[step], LENGTH), len(batches))  # noqa: B023
            whole = seconds(batches.rows, len(batches))
            tokens = len(batches) * n * LENGTH
            speeds = f"ids {tokens * size / ids / 1e9:.2f} GB/s, whole rows {tokens * size / whole / 1e9:.2f} GB/s"
            print(f"{dtype}, {n} rows at a time: {speeds} = {tokens / whole / 1e6:.0f}M tokens/s")


def seconds(read: Callable[[int], object], steps: int) -> float:
    began = time.process_time()
    for step in range(steps):
        read(step)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dir", type=Path, required=True, help="an existing folder with 1.5 GB of room")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--mb", type=int, default=256, help="size of the file that is read")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64], help="rows that are read at a time")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)  # in a process of its own: peaks add up
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    root = args.dir / "surgery-bench-data"
    if args.make or args.read:
        make(root) if args.make else reading(root, args.mb, args.rows)
        return
    root.mkdir()
    try:
        for step in ("--make", "--read"):
            again = [
                sys.executable,
                __file__,
                "--dir",
                str(args.dir),
                "--mb",
                str(args.mb),
                "--rows",
                *map(str, args.rows),
            ]
            print(timed([*again, step], Result()), end="", flush=True)
            if step == "--make":
                planning(root, args.runs)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
