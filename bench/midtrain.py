"""Tokens a second of `surgery midtrain` against transformers' Trainer and against a naive loop, on the same batches.

    python bench/midtrain.py                                       # 1M and 10M dense, 8 and 64 experts; minutes
    python bench/midtrain.py --models 1M --steps 20 --threads 2 --compile
    python bench/midtrain.py --precisions fp32                     # where the processor only emulates bf16

All loops of a model are alive in one process and take their steps in turns, so that whatever else the machine does
meets them alike; the best and the median step count, in wall time, and the fewest seconds of the processor.  A step has
2,048 tokens: forward, backward, clipping, AdamW.  Everybody starts from the same weights and sees the same batches; the
losses of the last step are printed, and how far the curves are apart.  Trainer runs with its defaults (fp32, sdpa,
fused AdamW, clip 1); mixtures run by its eager loop over experts and by its grouped_mm, which is the default.  The peak
is of a process of its own that takes five steps, less what one has that only imports.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOKENS = 2048
PRECISIONS = ("fp32", "autocast")
DENSE = {"model_type": "llama", "tie_word_embeddings": True}
MOE = {"model_type": "olmoe", "tie_word_embeddings": True, "hidden_size": 128, "vocab_size": 2048,
       "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 4, "pad_token_id": None}  # fmt: skip
MODELS: Mapping[str, tuple[int, dict[str, Any]]] = {  # sequence, config
    "1M": (128, {**DENSE, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "vocab_size": 2048,
                 "num_attention_heads": 4, "num_key_value_heads": 4}),
    "10M": (256, {**DENSE, "hidden_size": 352, "intermediate_size": 944, "num_hidden_layers": 6, "vocab_size": 4096,
                  "num_attention_heads": 4, "num_key_value_heads": 4}),
    "8e": (128, {**MOE, "intermediate_size": 352, "num_experts": 8, "num_experts_per_tok": 2}),
    "64e": (128, {**MOE, "intermediate_size": 88, "num_experts": 64, "num_experts_per_tok": 8}),
}  # fmt: skip


@dataclass
class Turns:
    """A loop in a thread of its own that takes a step when it is told to."""

    start: Callable[[Turns], None]
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self.start(self)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)

    def turn(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.go.release()
        self.done.acquire()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)

    def between(self) -> None:
        """Called by the loop after each step, and before the first."""
        self.done.release()
        self.go.acquire()


def make(place: Path, name: str, steps: int) -> None:
    """A model with random weights, and batches with something to learn."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sequence, config = MODELS[name]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(place / name)
    rng = np.random.default_rng(0)
    moves = rng.integers(1, 9, (steps, TOKENS // sequence, sequence))
    ids = np.cumsum(moves, -1) % config["vocab_size"]
    np.savez(place / f"{name}.npz", input_ids=ids.astype(np.uint16))


def ours(place: Path, name: str, precision: str, compile: bool) -> Callable[[Turns], None]:
    from surgery.midtraining.compiling import compiled
    from surgery.midtraining.loop import fresh_state, prepare, train
    from surgery.midtraining.run_file import make_run

    def start(turns: Turns) -> None:
        run = make_run({
            "model": {"path": str(place / name)}, "data": {"recorded": str(place / f"{name}.npz")},
            "output": str(place / "out"), "device": "cpu", "init": {"optimizer": "fresh"},
            "moe": {"balance": 0, "router_z": 0},  # Trainer has no loss of routers unless it is told
            "train": {"convention": "hf", "schedule": {"name": "constant", "start_lr": 1e-3}, "precision": precision,
                      "optimizer": {"betas": [0.9, 0.999], "weight_decay": 0.0}},
        })  # fmt: skip
        job = prepare(run)
        if compile:
            compiled(job.model, True, device="cpu", seconds=0, dense=not job.objective.routers)
        turns.between()
        train(job, fresh_state(job), _Told(turns), [lambda job, state: turns.between()])

    return start


class _Told:
    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def step(self, metrics: Any, times: Any) -> None:
        self.turns.losses.append(metrics["ce"])

    def event(self, step: int, level: str, text: str) -> None: ...
    def routing(self, step: int, kind: str, reading: Any) -> None: ...


def _rows(place: Path, name: str) -> Any:
    import numpy as np
    import torch

    return torch.from_numpy(np.load(place / f"{name}.npz")["input_ids"].astype(np.int64))


def _model(place: Path, name: str, experts: str | None) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    more = {"experts_implementation": experts} if experts else {}
    return AutoModelForCausalLM.from_pretrained(place / name, dtype=torch.float32, **more)


def trainer(place: Path, name: str, experts: str | None) -> Callable[[Turns], None]:
    """transformers' Trainer as it comes."""

    def start(turns: Turns) -> None:
        import torch
        from transformers import Trainer, TrainerCallback, TrainingArguments

        class Wait(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                turns.between()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                turns.between()

        class Sequential(Trainer):
            def _get_train_sampler(self, *args: Any) -> Any:
                return torch.utils.data.SequentialSampler(self.train_dataset)

            def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
                out = super().compute_loss(*args, **kwargs)
                turns.losses.append(float((out[0] if isinstance(out, tuple) else out).detach()))
                return out

        rows = _rows(place, name)
        flat = rows.flatten(0, 1)
        data = [{"input_ids": r, "labels": r} for r in flat]
        arguments = TrainingArguments(
            str(place / "trainer"), per_device_train_batch_size=rows.shape[1], max_steps=len(rows), learning_rate=1e-3,
            lr_scheduler_type="constant", report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
            logging_strategy="no",
        )  # fmt: skip
        Sequential(_model(place, name, experts), arguments, train_dataset=data, callbacks=[Wait()]).train()

    return start


def naive(place: Path, name: str, autocast: bool = False) -> Callable[[Turns], None]:
    """What is simplest.  With autocast it says how much bf16 gives on this processor, whoever asks for it."""

    def start(turns: Turns) -> None:
        import torch

        model = _model(place, name, None).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
        turns.between()
        for rows in _rows(place, name):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(input_ids=rows, labels=rows).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            turns.losses.append(float(loss.detach()))
            turns.between()

    return start


def loops(place: Path, name: str, precisions: Sequence[str], compile: bool) -> dict[str, Callable[[Turns], None]]:
    """The loops that are compared, by name; the first is what the others are measured by."""
    mixture = "num_experts" in MODELS[name][1]
    found = {"Trainer eager": trainer(place, name, "eager"), "Trainer grouped_mm": trainer(place, name, "grouped_mm")}
    if not mixture:
        found = {"Trainer": trainer(place, name, None)}
    found["naive loop"] = naive(place, name)
    if "autocast" in precisions:
        found["naive loop autocast"] = naive(place, name, autocast=True)
    for precision in precisions:
        found[f"surgery {precision}"] = ours(place, name, precision, False)
    if compile:
        found["surgery autocast compiled"] = ours(place, name, "autocast", True)
    return found


def measured(starts: Mapping[str, Callable[[Turns], None]], steps: int) -> dict[str, Turns]:
    """All loops, alive together, a step of each in turn."""
    turns = {}
    for loop, start in starts.items():
        turns[loop] = Turns(start)
        turns[loop].done.acquire()  # it is ready for its first step
    gc.freeze()
    for _ in range(steps):
        for each in turns.values():
            each.turn()
    return turns


def report(name: str, turns: Mapping[str, Turns], peaks: Mapping[str, float], warm: int) -> list[dict[str, Any]]:
    first = next(iter(turns.values()))
    base = min(first.wall[warm:])
    out = []
    print(f"\n{name}: {len(first.wall) - warm} steps of {TOKENS:,} tokens")
    print(f"  {'':28}{'best ms':>9}{'median':>9}{'cpu ms':>9}{'tok/s':>9}{'x':>7}{'peak MB':>9}{'loss':>9}{'apart':>9}")
    for loop, each in turns.items():
        best, median, cpu = min(each.wall[warm:]), statistics.median(each.wall[warm:]), min(each.cpu[warm:])
        apart = max(abs(a - b) for a, b in zip(each.losses, first.losses, strict=True))
        row = {"model": name, "loop": loop, "best": best, "median": median, "cpu": cpu, "times": base / best,
               "peak": peaks.get(loop), "loss": each.losses[-1], "apart": apart}  # fmt: skip
        peak = f"{row['peak']:9.0f}" if row["peak"] is not None else " " * 9
        print(f"  {loop:28}{best * 1e3:9.1f}{median * 1e3:9.1f}{cpu * 1e3:9.1f}{TOKENS / best:9,.0f}{row['times']:7.2f}"
              f"{peak}{row['loss']:9.4f}{apart:9.1e}", flush=True)  # fmt: skip
        out.append(row)
    return out


def peak_of(place: Path, name: str, loop: str, threads: int) -> float:
    """MB that five steps of a loop need beyond the imports, in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--alone",
        loop,
        "--models",
        name,
        "--dir",
        str(place),
        "--threads",
        str(threads),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def alone(place: Path, name: str, loop: str) -> None:
    """For `peak_of`."""
    import torch
    import transformers

    import surgery.midtraining.loop
    from surgery.tensors.memory import high_water

    assert torch and transformers.Trainer and surgery
    before = high_water()
    each = Turns(loops(place, name, PRECISIONS, "compiled" in loop)[loop])
    each.done.acquire()
    for _ in range(5):
        each.turn()
    print((high_water() - before) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--steps", type=int, default=30, help="steps of each loop, the first ones to warm up")
    parser.add_argument("--warm", type=int, default=5, help="steps that do not count")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS, help="of our loop")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile, which takes minutes")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks")
    parser.add_argument("--json", help="a file for the numbers")
    parser.add_argument("--dir", help=argparse.SUPPRESS)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)  # before torch is imported
    os.environ["TRANSFORMERS_VERBOSITY"], os.environ["HF_HUB_OFFLINE"] = "error", "1"
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from surgery.midtraining.experts import keep_compiled_gemms

    keep_compiled_gemms()  # as a run of a mixture does, and to everybody's good
    if asked.alone:
        return alone(Path(asked.dir), asked.models[0], asked.alone)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name in asked.models:
            make(place, name, asked.steps)
            starts = loops(place, name, asked.precisions, asked.compile)
            peaks = {} if asked.no_memory else {loop: peak_of(place, name, loop, asked.threads) for loop in starts}
            rows += report(name, measured(starts, asked.steps), peaks, asked.warm)
            sys.stdout.flush()
    if asked.json:
        Path(asked.json).write_text(json.dumps(rows, indent=1) + "\n")
    os._exit(0)  # the loops wait for a turn that does not come


if __name__ == "__main__":
    main()
