"""Runs that differ in the order of their data, and their soup: the mean of their weights, kept only if it is better."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.data.plans.batches import Batches
from surgery.data.plans.plan import open_plan
from surgery.errors import ConfigError, UsageError
from surgery.midtraining.run_file import read_run
from surgery.midtraining.run_folder import find_runs, read_folder, read_soup
from surgery.midtraining.seeds import make_soup, mean, parse_seeds, sets_of
from surgery.midtraining.sources import open_batches
from tests import tiny
from tests.test_midtrain_command import MIX, TEXT, invoke

SEEDS = (42, 666, 7)
RUN = """
model: {path: model}
data: {mixture: mix.yaml}
output: runs
train:
  micro_batch: 4
  precision: fp32
  schedule: {name: linear, start_lr: 3e-3}
export: {to: hf}
skip_self_tests: [learning_rate, vocabulary, causality, isolation, head, experts, conversion, mesh, gradient, update]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    tiny.save("llama", folder / "model", l=2, h=48, f=40, v=640)
    shutil.copy(TEXT / "tokenizer.json", folder / "model")
    (folder / "model" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    for number, name in enumerate(("prose", "more")):
        text = folder / f"{name}.jsonl"
        text.write_bytes(gzip.decompress((TEXT / "documents" / f"docs-0{number}.jsonl.gz").read_bytes()))
        invoke("data", "tokenize", str(text), str(folder / "tokens" / name), "--tokenizer", str(folder / "model"))
    (folder / "mix.yaml").write_text(MIX.replace("tokenizer: hf", "tokenizer: model").replace(".bin", ""))
    (folder / "run.yaml").write_text(RUN)
    return folder


@pytest.fixture(scope="module")
def said(place) -> str:
    return invoke("midtrain", str(place / "run.yaml"), "--seeds", ",".join(map(str, SEEDS)), "--soup")


def exported(place: Path, seed: int) -> Path:
    return next((place / "runs" / f"seed-{seed}" / "export").glob("*-hf")) / "model.safetensors"


def test_a_mixture_that_changed_is_planned_anew_until_a_checkpoint_was_trained_on_it(place):
    """And a dry run leaves no plan behind."""
    mix, run = place / "changing.yaml", place / "changing-run.yaml"
    mix.write_text((place / "mix.yaml").read_text())
    run.write_text(RUN.replace("mix.yaml", "changing.yaml").replace("runs", "changing"))
    first = json.loads(invoke("midtrain", str(run), "--dry-run", "--json"))["steps"]
    assert not (place / "changing").exists()

    def steps() -> int:
        return open_batches(read_run(run)[0]).plan.order.size

    before = steps()
    mix.write_text(mix.read_text().replace("tokens: 6400", "tokens: 3200"))
    assert 2 * json.loads(invoke("midtrain", str(run), "--dry-run", "--json"))["steps"] == pytest.approx(first, abs=1)
    after = steps()
    assert (before, after) == (200, 100)
    (place / "changing/checkpoints/step000000004").mkdir(parents=True)
    assert steps() == after
    mix.write_text(mix.read_text().replace("tokens: 3200", "tokens: 1600"))
    with pytest.raises(ConfigError, match=r"the mixture changed since the plan was made:\n.*budget.*3200.*1600"):
        steps()
    mix.unlink()
    assert steps() == after, "a run that goes on has its plan"


@pytest.mark.slow
def test_the_soup_is_the_mean_of_runs_in_other_orders(said, place):
    weights = [load_file(exported(place, seed)) for seed in SEEDS]
    assert not torch.equal(weights[0]["model.norm.weight"], weights[1]["model.norm.weight"])
    for name, tensor in load_file(place / "runs" / "soup" / "model.safetensors").items():
        wanted = torch.stack([w[name].double() for w in weights]).mean(0)
        torch.testing.assert_close(tensor.double(), wanted, atol=1e-6, rtol=1e-6)
    orders = [np.array(open_plan(place / "runs" / f"seed-{seed}" / "plan").order) for seed in SEEDS]
    assert len(orders[0]) == len(orders[1]) and not np.array_equal(orders[0], orders[1])


def test_all_hold_out_the_same_rows(said, place):
    found = [Batches(open_plan(place / "runs" / f"seed-{seed}" / "plan"), 1) for seed in SEEDS]
    for source in found[0].sources:
        rows = [batches.heldout(source).tokens for batches in found]
        assert len(rows[0]) and all(np.array_equal(rows[0], other) for other in rows[1:])


def test_the_better_is_kept_and_all_of_it_is_told(said, place):
    told = read_soup(place / "runs")
    losses = {each["name"]: mean(each["heldout"]) for each in told["ingredients"]} | {
        "soup": mean(told["soup"]["heldout"])
    }
    assert [*losses] == ["seed-42", "seed-666", "seed-7", "soup"]
    assert told["kept"] == min(losses, key=losses.__getitem__) and f"{told['kept']} is kept" in said
    for seed in SEEDS:  # by the loop's own evaluation at the end of the run
        last = read_folder(place / "runs" / f"seed-{seed}").evals[-1]["heldout"]
        assert mean(last) == pytest.approx(losses[f"seed-{seed}"], abs=1e-5)
    soup = place / "runs" / "soup"
    better = soup if told["kept"] == "soup" else exported(place, int(told["kept"].removeprefix("seed-"))).parent
    assert (place / "runs" / "kept").resolve() == better.resolve()
    assert [run.name for run in find_runs([str(place / "runs")])] == ["seed-42", "seed-666", "seed-7"]


def test_the_same_command_again_trains_nothing(said, place):
    before = read_soup(place / "runs")
    times = [(place / "runs" / f"seed-{seed}" / "times.jsonl").read_bytes() for seed in SEEDS]
    words = ["midtrain", str(place / "run.yaml"), "--seeds", "42,666,7", "--soup", "--json"]
    assert '"kept"' in invoke(*words)
    assert read_soup(place / "runs") == before
    assert [(place / "runs" / f"seed-{seed}" / "times.jsonl").read_bytes() for seed in SEEDS] == times


def test_a_soup_that_one_ingredient_spoils_is_not_kept(said, place, tmp_path):
    shutil.copytree(place, tmp_path / "place", symlinks=True)
    spoilt = exported(tmp_path / "place", 666)
    save_file({n: torch.randn_like(t) for n, t in load_file(spoilt).items()}, spoilt, {"format": "pt"})
    run = read_run(tmp_path / "place" / "run.yaml")[0]
    found = make_soup(run, SEEDS)
    assert found.kept in ("seed-42", "seed-7") and mean(found.soup) > mean(found.ingredients[found.kept]) + 0.1
    assert (tmp_path / "place" / "runs" / "kept").resolve() == found.path.resolve()
    assert json.loads((tmp_path / "place" / "runs" / "soup.json").read_text())["kept"] == found.kept


def test_what_makes_no_sense_is_refused(place):
    assert parse_seeds("42, 666") == (42, 666)
    for wrong in ("", "42,42", "a", "-1", "4.5", "1,,2"):
        with pytest.raises(UsageError):
            parse_seeds(wrong)
    run = read_run(place / "run.yaml", ["data={plan: plan}"])[0]
    with pytest.raises(UsageError, match="the order of a plan"):
        sets_of(run, 42)
    assert "--soup goes with --seeds" in invoke("midtrain", str(place / "run.yaml"), "--soup", fails=True)
