"""Time, memory and bytes of `surgery soup` against `mergekit-yaml` and against `cp`, on the same files.

    python bench/soup.py --dir /big/disk/tmp                       # three models of about 2 GB in bfloat16
    python bench/soup.py --dir /tmp/bench --gb 0.3 --methods linear ties --runs 1

A synthetic Llama-shaped model and two copies with noise are merged by each method, by both programs one after the
other; `cp` copies all inputs of the merge and as much again as its output.  Medians of the runs.  `wall` is of the
whole process, imports included; `work` is what the program measures without them; `cpu` and `peak` are less those of a
process that only imports the modules.  surgery runs once before it is measured, for numba compiles its loops at their
first call and keeps them; it runs with its default arithmetic (fp32, rounded once) and without reading back, once as
it does by default, and once with `--no-sync`: neither `cp` nor mergekit waits until the disk has its output.  mergekit
runs with `dtype: float32`, `out_dtype: bfloat16`, which is the same arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

from timing import Result, timed

EMPTY = (
    "import torch, numpy, surgery.cli.main, surgery.merging.engine.pool as e, surgery.merging.run; e.compiled_loops()"
)
TASK = {"weight": 0.5, "density": 0.5}
# method -> how many models (of which the first is the base), parameters of each, of the whole
METHODS: Mapping[str, tuple[int, Mapping[str, float], Mapping[str, float]]] = {
    "linear": (3, {"weight": 1}, {}),
    "slerp": (2, {}, {"t": 0.4}),
    "ties": (3, TASK, {}),
    "dare_ties": (3, TASK, {}),
    "della": (3, TASK, {}),
    "model_stock": (3, {}, {}),
    "sce": (3, {}, {"select_topk": 0.5}),
}


def make(root: Path, size: float) -> None:
    """Three models under `root`; the same bits every time."""
    import torch
    from safetensors.torch import load_file, save_file

    sys.path.insert(0, str(Path(__file__).parent))
    from convert import make_checkpoint

    make_checkpoint(root / "model-0", size)
    for i in (1, 2):
        generator = torch.Generator().manual_seed(i)
        copy = root / f"model-{i}"
        shutil.copytree(root / "model-0", copy)
        for path in sorted(copy.glob("*.safetensors")):
            tensors = load_file(path)
            noisy = {
                n: t + torch.randn(t.shape, generator=generator).mul_(0.002).bfloat16() for n, t in tensors.items()
            }
            save_file(noisy, path, {"format": "pt"})


def write_config(root: Path, method: str) -> Path:
    """The YAML of a method, for both programs."""
    count, own, shared = METHODS[method]
    based = method != "linear"
    models = [{"model": str(root / f"model-{i}"), "parameters": own if i or not based else {}} for i in range(count)]
    config = {
        "merge_method": method,
        "models": models,
        "parameters": shared,
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    if based:
        config["base_model"] = str(root / "model-0")
    path = root / f"{method}.yaml"
    path.write_text(json.dumps(config))  # which is YAML
    return path


def measure(root: Path, method: str, runs: int, memory: str, theirs: bool) -> dict[str, Result]:
    """One method by all programs."""
    ours = {"surgery": [], "unsynced": ["--no-sync"]}
    results = {name: Result() for name in ("imports", "cp", *ours, *(["mergekit"] if theirs else []))}
    path, out = write_config(root, method), root / "out"
    inputs = [str(root / f"model-{i}") for i in range(METHODS[method][0])]
    copies = "; ".join(f"cp -r '{src}' '{out}/{i}'" for i, src in enumerate([*inputs, inputs[0]]))
    soup = [
        sys.executable,
        "-m",
        "surgery",
        "soup",
        str(path),
        str(out),
        "--no-verify",
        "--json",
        "--max-memory",
        memory,
    ]
    mergekit = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(path), str(out), "--quiet"]
    timed(soup, Result(), quiet=True)
    shutil.rmtree(out)
    for _ in range(runs):
        timed([sys.executable, "-c", EMPTY], results["imports"])
        out.mkdir()
        timed(["sh", "-c", copies], results["cp"])
        shutil.rmtree(out)
        os.sync()
        for name, more in ours.items():
            own = results[name]
            own.report = json.loads(timed([*soup, *more], own, quiet=True))
            own.work.append(float(str(own.report["seconds"])))
            shutil.rmtree(out)
            os.sync()
        if theirs:
            timed([*mergekit, "--no-copy-tokenizer", "--no-write-model-card"], results["mergekit"], quiet=True)
            shutil.rmtree(out)
            os.sync()
    return results


def show(method: str, results: Mapping[str, Result], size: int) -> None:
    mid = statistics.median
    imports, cp = results["imports"], mid(results["cp"].wall)
    for name in ("cp", "surgery", "unsynced", "mergekit"):
        if name not in results:
            continue
        result = results[name]
        wall = mid(result.wall)
        work = mid(result.work) if result.work else wall - (mid(imports.wall) if name == "mergekit" else 0)
        base = Result(cpu=[0], peak=[0]) if name == "cp" else imports
        cpu, peak = mid(result.cpu) - mid(base.cpu), (mid(result.peak) - mid(base.peak)) / 2**20
        read = int(str(result.report.get("read_bytes", 0))) / size
        row = f"{wall:9.2f}{work:9.2f}{work / cp:9.2f}{cpu:9.2f}{peak:10.0f}" + (f"{read:8.2f}" if read else " " * 8)
        if name == "mergekit":
            synced, unsynced = (work / mid(results[own].work) for own in ("surgery", "unsynced"))
            row += f"   {synced:.1f} x the work of surgery, {unsynced:.1f} x unsynced"
        print(f"{method:12}{name:10}{row}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dir", type=Path, required=True, help="an existing folder on the disk to measure")
    parser.add_argument("--gb", type=float, default=2.0, help="size of each model in GB")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--max-memory", default="256MiB")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--no-mergekit", action="store_true", help="surgery and cp alone")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)  # in a process of its own: peaks add up
    args = parser.parse_args()
    root = args.dir / "surgery-bench-soup"
    if args.make:
        make(root, args.gb * 1e9)
        return
    root.mkdir()
    try:
        timed([sys.executable, __file__, "--make", "--dir", str(args.dir), "--gb", str(args.gb)], Result())
        size = sum(p.stat().st_size for p in (root / "model-0").glob("*.safetensors"))
        print(f"models of {size / 1e9:.2f} GB")
        head = f"{'wall s':>9}{'work s':>9}{'/ cp':>9}{'cpu s':>9}{'peak MiB':>10}{'read':>8}"
        print(f"{'method':12}{'program':10}{head}")
        for method in args.methods:
            show(method, measure(root, method, args.runs, args.max_memory, not args.no_mergekit), size)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
