"""`surgery eval --engine lm-eval`: what reaches the harness, by a stand-in; and the harness itself, if it is here.

pip install 'checkpoint-surgery[eval]' && python -m pytest tests/test_eval_harness.py
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
from click.testing import CliRunner

from surgery.cli.main import main

GOLDEN = Path(__file__).parent / "golden" / "lm_eval"
SAID = json.loads((GOLDEN / "golden.json").read_text())["tasks"]["chosen/rc_0shot"]
INSTALLED = importlib.util.find_spec("lm_eval") is not None
YAML = """
task: chosen
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def run(*words):
    return CliRunner().invoke(main, ["eval", str(GOLDEN / "model"), "--engine", "lm-eval", *map(str, words)])


@pytest.fixture
def tasks(tmp_path):
    """The golden documents as a task of lm-eval's own kind."""
    lines = map(
        json.loads, gzip.decompress((GOLDEN / "tasks/chosen/rc_0shot/requests.jsonl.gz").read_bytes()).splitlines()
    )
    docs = [
        {"context": x["request"]["context"], **x["doc"]} for x in lines if x["idx"] == 0 and x["doc_id"] < 1_000_000
    ]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "chosen.yaml").write_text(YAML.format(data=tmp_path / "docs.jsonl"))
    return tmp_path


@pytest.mark.skipif(not INSTALLED, reason="the extra [eval] is not installed")
def test_lm_eval_runs_the_model(tasks, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks / "cache"))
    done = run("--tasks", "chosen", "--task-data", tasks, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["tasks"]["chosen"]
    for metric in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
        assert found[metric] == pytest.approx(SAID[metric], abs=1e-12), metric
    assert found["documents"] == 12


@pytest.mark.skipif(not INSTALLED, reason="the extra [eval] is not installed")
def test_what_lm_eval_does_not_know_is_refused(tasks):
    done = run("--tasks", "no_such_task", "--task-data", tasks)
    assert done.exit_code == 2
    assert "lm-eval has no task no_such_task" in done.output


@pytest.fixture
def stand_in(monkeypatch):
    """A package that notes what it is given."""
    given = {}

    def evaluate(**more):
        if more["tasks"] == ["broken"]:
            raise ConnectionError("no hub here")
        given.update(more)
        return {"results": {"chosen": {"alias": "chosen", "sample_len": 3, "acc,none": 0.5, "acc_stderr,none": 0.1}}}

    class Manager:
        def __init__(self, include_path):
            given["include"] = include_path

        def match_tasks(self, names):
            return [name for name in names if name in ("chosen", "broken")]

    made = {
        "lm_eval": {"simple_evaluate": evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {
            "HFLM": lambda pretrained, **more: types.SimpleNamespace(pretrained=pretrained, **more)
        },
        "lm_eval.tasks": {"TaskManager": Manager},
    }
    for name, members in made.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return given


def test_the_harness_gets_the_model_as_it_is(stand_in, tmp_path):
    done = run("--tasks", "chosen", "--task-data", tmp_path, "--limit", 3, "--json", "--context", 24)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tasks"] == {"chosen": {"documents": 3, "acc": 0.5, "acc_stderr": 0.1}}
    assert stand_in["include"] == str(tmp_path)
    assert stand_in["limit"] == 3
    harness = stand_in["model"]
    assert harness.max_length == 24
    assert not harness.pretrained.training
    assert harness.tokenizer("the cat").input_ids[0] == harness.tokenizer.bos_token_id == 0
    assert harness.tokenizer.eos_token == "</s>"


def test_what_it_raises_is_one_message(stand_in):
    done = run("--tasks", "broken")
    assert done.exit_code == 1
    assert "lm-eval failed: ConnectionError: 'no hub here'" in done.output
    assert "or the hub reachable" in done.output
    assert "lm-eval has no task other" in run("--tasks", "other").output


def test_without_it_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = run("--tasks", "chosen")
    assert done.exit_code == 1
    assert "pip install 'checkpoint-surgery[eval]'" in done.output
