"""Every recipe can be read, full-size and small, has its page, and runs to the end as its small twin."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from surgery.jobs.graph import graph_of
from surgery.jobs.recipe import read_recipe
from surgery.jobs.schedulers import SCHEDULERS
from surgery.jobs.scripts import jobs_of, script_of
from surgery.jobs.site import Site
from surgery.jobs.step import near

ROOT = Path(__file__).parent.parent
RECIPES = sorted(p.stem for p in (ROOT / "recipes").glob("*.yaml"))
PAGES = {"quickstart": "README.md", "midtrain": "docs/midtrain.md"}  # their twins are run by test_recipes.py
CHANCE = math.log(2048)  # the loss of who knows nothing, with the vocabulary of recipes/corpus.py
LOSS = re.compile(r"^ \S+ +(\d+\.\d{4}) +\d+\.\d{4} +[\d,]+ ", re.MULTILINE)
DIGEST = re.compile(r" documents, \S+ MB, ([0-9a-f]{12}) of ")
EVALUATED = re.compile(r"^eval step=11 heldout/text/loss=(\d+\.\d+)", re.MULTILINE)
# how many losses the last table of a twin has, and how many of them are of models that nobody has trained
TABLES = {
    "llemma": (6, 3), "llmjp-v4": (9, 0), "llama-moe-v2": (4, 2), "olmoe": (3, 0), "upcycle": (4, 2),
    "olmo-continue": (1, 0),
}  # fmt: skip


@pytest.mark.parametrize("small", [False, True], ids=["full", "small"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_can_be_read_and_launched(name, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = graph_of(read_recipe(ROOT / "recipes" / f"{name}.yaml", small=small))
    for scheduler in SCHEDULERS.values():
        for job in jobs_of(steps, 8):
            script_of(job, scheduler, Site(), tmp_path / "run", tmp_path)
    for step in steps:
        step.command(near)
        step.config(near)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_a_page_that_names_it(name):
    pages = [ROOT / PAGES[name]] if name in PAGES else [*(ROOT / "docs" / "recipes").glob("*.md")]
    assert any(f"recipes/{name}.yaml" in page.read_text() for page in pages)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [n for n in RECIPES if n not in PAGES])
def test_a_small_twin_runs_to_the_end(name, tmp_path):
    if not os.environ.get("SURGERY_RECIPES"):
        pytest.skip("make test-recipes")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "surgery", "run", ROOT / "recipes" / f"{name}.yaml", "--small", "--json"]
    done = subprocess.run(list(map(str, words)), cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = {s["step"]: s for s in json.loads(done.stdout)["steps"]}
    assert {s["state"] for s in steps.values()} == {"done"}
    for step, state in steps.items():
        log = Path(state["log"]).read_text()
        digests = DIGEST.findall(log)
        assert all(digest in (ROOT / "docs/recipes.md").read_text() for digest in digests), "the pages show other text"
        if step in ("same", "equal"):
            assert "the same model" in log
        if step == "moe":
            assert (
                "proof  not preserving" if name.endswith(("-residual", "-attention-moe")) else "proof  exact"
            ) in log
    many, untrained = next(table for begun, table in TABLES.items() if name.startswith(begun))
    last, pattern = ("train", EVALUATED) if name == "olmo-continue" else ("losses", LOSS)
    losses = [float(number) for number in pattern.findall(Path(steps[last]["log"]).read_text())]
    assert len(losses) == many, losses
    assert len([loss for loss in losses if CHANCE < loss < CHANCE + 0.1]) == untrained, losses
    assert len([loss for loss in losses if 0 < loss < CHANCE]) == many - untrained, losses
    again = subprocess.run(list(map(str, words)), cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert {s["state"] for s in json.loads(again.stdout)["steps"]} == {"unchanged"}
