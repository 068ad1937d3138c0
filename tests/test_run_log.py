"""What a run writes and shows: lines without gaps or repeats however it is killed, panels, trackers, speed."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from surgery.errors import FileError, OutputError, SurgeryError
from surgery.formats.registry import open_checkpoint
from surgery.midtraining import run_folder
from surgery.midtraining.log import JsonLines, Lines, RunLog, flat, plain
from surgery.midtraining.panel import Panel, clock, evaluated, sparkline
from surgery.midtraining.throughput import PEAKS, Meter, flops_per_token, peak_flops, positions_seen, weights_met
from surgery.midtraining.trackers import TensorBoard, Wandb
from tests import tiny


def steps(log, numbers):
    for step in numbers:
        log.step({"step": step, "loss": 1 / step, "lr": 1e-3}, {"seconds": 0.1 * step})


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# files


def test_a_resumed_run_writes_what_an_uninterrupted_one_writes(tmp_path):
    steps(RunLog(tmp_path / "whole"), range(1, 21))
    log = RunLog(tmp_path / "cut")
    steps(log, range(1, 16))  # the checkpoint is of step 10; five more are lost
    log.evaluation({"step": 10, "heldout": {}})
    log.evaluation({"step": 15, "heldout": {}})
    log.close()
    log = RunLog(tmp_path / "cut", resumed=10)
    steps(log, range(11, 21))
    log.end("finished", 20)
    name = run_folder.METRICS
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [r["step"] for r in lines(tmp_path / "cut", run_folder.EVALS)] == [10]
    assert [r["step"] for r in lines(tmp_path / "cut", run_folder.TIMES)] == list(range(1, 21))
    assert lines(tmp_path / "cut", run_folder.EVENTS) == []


def test_a_new_run_begins_with_empty_files(tmp_path):
    steps(RunLog(tmp_path), [1, 2])
    steps(RunLog(tmp_path), [1])
    assert [r["step"] for r in lines(tmp_path, run_folder.METRICS)] == [1]


@pytest.mark.parametrize("torn", [b'{"step":6,"lo', b"\x00" * 30, b'{"step":6}'])  # the last has no end of line
def test_a_line_that_was_being_written_is_cut_off(tmp_path, torn):
    log = RunLog(tmp_path)
    steps(log, range(1, 6))
    log.close()
    with (tmp_path / run_folder.METRICS).open("ab") as file:
        file.write(torn)
    steps(RunLog(tmp_path, resumed=5), [6])
    assert [r["step"] for r in lines(tmp_path, run_folder.METRICS)] == [1, 2, 3, 4, 5, 6]


def test_damage_before_the_checkpoint_is_not_passed_over(tmp_path):
    steps(RunLog(tmp_path), range(1, 6))
    path = tmp_path / run_folder.METRICS
    path.write_bytes(path.read_bytes().replace(b'{"step":3', b'{"step:3'))
    with pytest.raises(FileError, match=r"line 3 is damaged, though others follow"):
        RunLog(tmp_path, resumed=5)
    assert b'"step":5' in path.read_bytes()  # nothing was lost


@pytest.mark.parametrize(("upto", "said"), [(3, "metrics.jsonl ends with step 3"), (0, "metrics.jsonl is gone")])
def test_a_gap_is_told(tmp_path, upto, said):
    steps(RunLog(tmp_path), range(1, upto + 1))
    RunLog(tmp_path, resumed=5)
    (event,) = lines(tmp_path, run_folder.EVENTS)
    assert event == {"step": 5, "level": "alarm", "text": f"resumed from step 5, but {said}"}


KILLED = """
import sys
from surgery.midtraining.log import RunLog
first, last, resumed = (int(x) for x in sys.argv[2:])
log = RunLog(sys.argv[1], resumed=resumed or None)
print("ready", flush=True)
for step in range(first, last + 1):
    log.step({"step": step, "loss": 1 / step, "text": "x" * 300}, {"seconds": step})
    log.evaluation({"step": step})
"""


def test_kill_at_any_moment(tmp_path):
    """Killed four times at random; each time it goes on from a step that was certainly logged, as from a checkpoint."""
    whole, chance, at = tmp_path / "whole", random.Random(8), 0
    for _ in range(4):
        words = [sys.executable, "-c", KILLED, str(tmp_path / "run"), str(at + 1), "100000000", str(at)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        signal.sigtimedwait([], chance.random() / 10)
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = [r["step"] for r in lines_that_are_whole(tmp_path / "run" / run_folder.EVALS)]
        at = chance.randint(at, done[-1]) if done else at
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "run"), str(at + 1), str(at + 9), str(at)], check=True)
    subprocess.run([sys.executable, "-c", KILLED, str(whole), "1", str(at + 9), "0"], check=True)
    for name in (run_folder.METRICS, run_folder.EVALS, run_folder.TIMES):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


def lines_that_are_whole(path):
    return [json.loads(line) for line in path.read_bytes().splitlines(True) if line.endswith(b"\n")]


def test_the_end_is_written_and_goes_when_the_run_goes_on(tmp_path):
    log = RunLog(tmp_path)
    steps(log, [1])
    log.end("stopped", 1, "SIGTERM")
    assert json.loads((tmp_path / run_folder.END).read_text()) == {"status": "stopped", "step": 1, "reason": "SIGTERM"}
    RunLog(tmp_path, resumed=1)
    assert not (tmp_path / run_folder.END).exists()


def test_sync_reaches_the_disk(tmp_path, monkeypatch):
    log, synced = RunLog(tmp_path), []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    log.sync()
    assert {Path(p).name for p in synced} == set(run_folder.LINES)


def test_numbers_of_every_kind_become_json():
    value = {
        "a": np.float32(1.5),
        "b": torch.tensor([1, 2]),
        "c": float("nan"),
        "d": (np.int64(3), -float("inf")),
        5: None,
    }
    assert plain(value) == {"a": 1.5, "b": [1, 2], "c": "nan", "d": [3, "-inf"], "5": None}
    assert json.loads(json.dumps(plain(0.1))) == 0.1


def test_what_is_written_is_read_back(tmp_path):
    log = RunLog(tmp_path)
    steps(log, [1, 2])
    log.experts({"step": 2, "load": torch.ones(2, 3)})
    log.event(2, "note", "ünïcödé")
    log.end("finished", 2)
    run = run_folder.read_folder(tmp_path)
    assert [r["loss"] for r in run.metrics] == [1.0, 0.5]
    assert run.experts[0]["load"] == [[1, 1, 1], [1, 1, 1]]
    assert run.events[0]["text"] == "ünïcödé"
    assert (run.status, run.step, run.lacking) == ("finished", 2, ())


def test_a_full_disk_is_an_error_and_no_traceback(tmp_path):
    held = JsonLines(tmp_path / "x.jsonl")
    held.write({"step": 1})
    held.file.close()
    held.file = open("/dev/full", "ab")  # noqa: SIM115
    with pytest.raises(OutputError, match=r"x\.jsonl: cannot be written: No space left"):
        held.write({"step": 2, "text": "x" * 100_000})
    assert held.last == {"step": 1}


# lines


def test_plain_lines_can_be_parsed(tmp_path):
    out: list[str] = []
    log = RunLog(tmp_path, [Lines(out.append, every=2, steps=5)])
    steps(log, range(1, 6))
    log.evaluation(
        {"step": 5, "heldout": {"my math": {"loss": 3.5, "bpb": None, "tokens": 9}}, "tasks": {"t/v": {"acc": 0.5}}}
    )
    log.event(5, "alarm", 'an "odd" text')
    assert out == [
        "step step=2 loss=0.5 lr=0.001 seconds=0.2 eta=0.6",
        "step step=4 loss=0.25 lr=0.001 seconds=0.4 eta=0.4",
        "step step=5 loss=0.2 lr=0.001 seconds=0.5 eta=0",
        "eval step=5 heldout/my_math/loss=3.5 tasks/t/v/acc=0.5",
        r'alarm step=5 text="an \"odd\" text"',
    ]


def test_flat_names():
    assert flat({"a": {"b": 1, "c": {"d": 2}}, "e": [1], "f": "x"}) == {"a/b": 1, "a/c/d": 2, "f": "x"}


# the panel


def drawn(width):
    out = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    panel = Panel("runs/anneal", steps=1600, console=out)
    router = {"max_load": 1.83, "load_entropy": 0.97, "dead": 0.125}
    rates = {"tokens_per_second": 13486.2, "tokens_per_second_mean": 12900.0, "tflops": 0.101, "mfu": None}
    times = {"seconds": 0.5, **rates, "parts": {"data": 0.01, "compute": 0.48, "save": 0.0}}
    for step in range(1, 401):
        panel.step({"step": step, "loss": 4 - step / 400, "lr": 2e-4, "grad_norm": 0.8, "router": router}, times)
    panel.evaluation(
        {"step": 400, "heldout": {"math": {"loss": 3.517}}, "tasks": {"arc_easy/rc_0shot": {"acc_norm": 0.45}}}
    )
    panel.event({"step": 399, "level": "alarm", "text": "left out"})
    shown = Console(file=io.StringIO(), width=width, color_system=None)
    shown.print(panel.draw())
    panel.close()
    return shown.file.getvalue(), out.file.getvalue()


@pytest.mark.parametrize("width", [60, 100, 160])
def test_the_panel_tells_everything_on_any_width(width):
    text, _ = drawn(width)
    words = " ".join(text.replace("│", " ").split())
    for said in ("400 of 1,600", "25%", "10:00 left", "3.0000", "lr 2.000e-04", "gradient 0.800", "13,486 tokens/s",
                 "12,900 on average", "101.0 GFLOP/s", "compute 96%", "busiest expert 1.83 x its share", "12% dead",
                 "at 400: math 3.517 arc_easy 0.450", "step 399: left out"):  # fmt: skip
        assert said in words
    assert "save" not in words
    assert max(map(len, text.splitlines())) <= width


def test_evaluations_stay_above_the_panel():
    assert "step 400: math 3.517" in drawn(100)[1]


def test_small_curves_and_clocks():
    assert sparkline([1, 2, 3, 4], 4) == "▁▃▆█"
    assert sparkline([5, 5], 4) == "▁▁"
    assert len(sparkline(range(1000), 40)) == 40
    assert sparkline([], 9) == ""
    assert [clock(x) for x in (5, 125, 3725, 200_000)] == ["0:05", "2:05", "1:02:05", "2 d 7 h"]


# trackers


class Fake:
    """Stands for a package: notes how it is called."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs)) or self


RECORDS = ({"step": 7, "loss": 2.5, "skipped": False, "router": {"max_load": 1.5}}, {"seconds": 0.5})
SCALARS = {"loss": 2.5, "skipped": 0.0, "router/max_load": 1.5, "time/seconds": 0.5}


def test_tensorboard_gets_every_number(tmp_path, monkeypatch):
    fake = Fake()
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda *a, **k: fake.calls.append(("new", a, k)) or fake
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = RunLog(tmp_path, [TensorBoard(tmp_path / "tb", resumed=6)])
    log.step(*RECORDS)
    log.evaluation({"step": 7, "heldout": {"math": {"loss": 3.5}}})
    log.event(7, "alarm", "text")
    log.end("finished", 7)
    assert fake.calls[0] == ("new", (str(tmp_path / "tb"),), {"purge_step": 7})
    written = {a[0]: a[1:] for name, a, _ in fake.calls if name == "add_scalar"}
    assert written == {k: (v, 7) for k, v in SCALARS.items()} | {"heldout/math/loss": (3.5, 7)}
    assert fake.calls[-1][0] == "close"


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    fake = Fake()
    fake.id = "abc"
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resumed in (None, 7):
        view = Wandb(tmp_path, "anneal", {"seed": 1}, resumed=resumed)
        view.step(*RECORDS)
        view.event({"step": 7, "level": "note", "text": "x"})
        view.close()
    begun = [kwargs for name, _, kwargs in fake.calls if name == "init"]
    assert [(b["id"], b["resume"]) for b in begun] == [(None, None), ("abc", "allow")]
    logged = [args[0] for name, args, _ in fake.calls if name == "log"]
    assert logged[0] == {"step": 7, **SCALARS}
    assert "alert" not in {name for name, *_ in fake.calls}


@pytest.mark.parametrize(("make", "module"), [(lambda p: TensorBoard(p), "torch.utils.tensorboard"),
                                              (lambda p: Wandb(p, "x"), "wandb")])  # fmt: skip
def test_a_tracker_that_is_not_installed_says_how_to_get_it(tmp_path, monkeypatch, make, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SurgeryError, match=r"(?s)not installed.*pip install 'checkpoint-surgery\[tracking\]'"):
        make(tmp_path)


# speed


@pytest.mark.parametrize("family", ["llama", "llama_tied", "mixtral", "olmoe", "gpt2", "qwen2_moe"])
def test_flops_are_what_torch_counts(tmp_path, family):
    """Forward and backward in eager attention, where every position is multiplied with all of the sequence."""
    folder = tiny.save(family, tmp_path / family)
    spec, length = open_checkpoint(folder).spec, 16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager",
                                                 experts_implementation="eager")  # fmt: skip
    ids = torch.randint(0, spec.vocab, (2, length), generator=torch.Generator().manual_seed(1))
    model.get_input_embeddings().weight.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)  # norms and biases: no matrix products
    attention = 12 * spec.heads * spec.head_dim * spec.layers * length
    expected = ids.numel() * (6 * (weights_met(spec) - vectors) + attention)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)
    causal = flops_per_token(spec, length) - 6 * weights_met(spec)
    full = not spec.windows
    assert causal == pytest.approx(attention * (length + 1) / 2 / length) if full else causal < attention


def test_positions_are_counted_as_a_mask_has_them():
    for length, window in ((7, 0), (7, 3), (7, 1), (5, 9)):
        mask = [[j <= i and (not window or i - j < window) for j in range(length)] for i in range(length)]
        assert positions_seen(length, window) == pytest.approx(sum(map(sum, mask)) / length)


@pytest.mark.parametrize(("name", "peak"), [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12),
    ("AMD Instinct MI300X", 1307.4e12), ("NVIDIA GeForce RTX 4090", 165.2e12), ("cpu", None), ("A1000", None),
])  # fmt: skip
def test_peaks_of_devices(name, peak):
    assert peak_flops(name) == peak


def test_every_peak_is_found_by_its_own_name():
    assert all(peak_flops(f"NVIDIA {name} 80GB") == peak for name, peak in PEAKS.items())


def test_the_meter_knows_the_last_steps_and_all_of_them():
    meter = Meter(flops=1e6, peak=1e12, devices=2)
    for i in range(64):
        meter.add(1000, 1.0 if i < 32 else 0.5)
    expected = {"tokens_per_second": 2000.0, "tokens_per_second_mean": 64_000 / 48, "seconds_mean": 0.75}
    assert meter.rates() == pytest.approx({**expected, "tflops": 1e-3, "mfu": 1e-3})
    assert Meter(1.0, None).rates()["mfu"] is None


def test_json_lines_keep_only_their_own_file(tmp_path):
    held = JsonLines(tmp_path / "x.jsonl")
    held.write({"step": 3})
    held.close()
    assert JsonLines(tmp_path / "x.jsonl", 3).last == {"step": 3}
    assert JsonLines(tmp_path / "x.jsonl", 2).last == {}


def test_speed_is_added_to_the_times(tmp_path, monkeypatch):
    clock = iter([100.0, 101.0, 105.0])
    monkeypatch.setattr("surgery.midtraining.log.time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    steps_at = {1: 500, 2: 1000, 3: 1500}
    log = RunLog(tmp_path, meter=Meter(1e6, None))
    for step, tokens in steps_at.items():
        log.step({"step": step, "tokens": tokens}, {"seconds": 0.5, "parts": {"data": 0.5}})
    told = lines(tmp_path, run_folder.TIMES)
    assert [t["parts"]["elsewhere"] for t in told] == [0.0, 0.5, 3.5]  # an evaluation before the third
    assert [t["tokens_per_second"] for t in told] == [1000.0] * 3
    assert told[-1]["tokens_per_second_mean"] == pytest.approx(1500 / 5.5)
    assert told[-1]["seconds_mean"] == pytest.approx(5.5 / 3)


def test_speed_after_a_resumption_counts_from_there(tmp_path):
    RunLog(tmp_path).step({"step": 1, "tokens": 9_000_000}, {"seconds": 1.0})
    log = RunLog(tmp_path, resumed=1, meter=Meter(1.0, None))
    log.step({"step": 2, "tokens": 9_000_500}, {"seconds": 0.5})
    assert lines(tmp_path, run_folder.TIMES)[-1]["tokens_per_second"] == 1000.0


def test_what_files_say_reaches_no_terminal_as_a_command():
    record = {"step": 1, "heldout": {"a\x1b[2J{b}": {"loss": 2.0}}}
    assert evaluated(record) == "a\\x1b[2J{b} 2.000"
    out: list[str] = []
    Lines(out.append).evaluation(record)
    assert out == ["eval step=1 heldout/a\\x1b[2J{b}/loss=2"]
