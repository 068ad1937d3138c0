"""`surgery midtrain` from text to an exported checkpoint: planned, foretold, tested, trained, written, read again."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner

from surgery.cli.main import main
from surgery.cli.midtrain import _views
from surgery.conversion.convert import convert
from surgery.formats.registry import open_checkpoint
from surgery.midtraining import trackers
from surgery.midtraining.evaluation.opened import open_for_evaluation
from surgery.midtraining.evaluation.run import Wanted, evaluate
from surgery.midtraining.report.tables import tables
from surgery.midtraining.run_file import make_run, read_run
from surgery.midtraining.run_folder import read_folder
from surgery.midtraining.selftests import MOVED, TESTS
from surgery.midtraining.settings_train import Train
from surgery.storage.push import push
from surgery.verification import compare
from tests import tiny
from tests.buckets import keys, moto

TEXT = Path(__file__).parent / "golden" / "tokenize"
MIX = """
tokenizer: hf
sequence_length: 32
rows_per_step: 8
holdout: 2
seed: 3
sources:
  - {name: prose, paths: tokens/prose.bin, weight: 2}
  - {name: more, paths: tokens/more.bin, weight: 1, max_epochs: 2}
budget: {tokens: 6400}
"""
RUN = """
model: {path: meta}
data: {plan: plan}
output: runs/anneal
train:
  micro_batch: 4
  precision: fp32
  schedule: {name: linear, start_lr: 3e-3, warmup: 8%}
export:
  - {to: hf, every: 20}
  - {to: megatron, tp: 2}
"""


def invoke(*words: str, fails: bool = False) -> str:
    done = CliRunner().invoke(main, list(words), catch_exceptions=False)
    assert (done.exit_code != 0) == fails, done.output
    return done.output


def same(a: Path, b: Path) -> bool:
    return compare(open_checkpoint(a), open_checkpoint(b), max_memory=1 << 26).same


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model as Meta writes it, with its tokenizer beside, and a plan of two sources."""
    folder = tmp_path_factory.mktemp("midtrain")
    tiny.save("llama", folder / "hf", l=2, h=48, f=40, v=640)
    shutil.copy(TEXT / "tokenizer.json", folder / "hf")
    (folder / "hf" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    convert(folder / "hf", folder / "meta", to="meta", sync=False)
    for number, name in enumerate(("prose", "more")):
        text = folder / f"{name}.jsonl"
        text.write_bytes(gzip.decompress((TEXT / "documents" / f"docs-0{number}.jsonl.gz").read_bytes()))
        invoke("data", "tokenize", str(text), str(folder / "tokens" / name), "--tokenizer", str(folder / "hf"))
        (folder / "tokens" / f"{name}.bin").symlink_to(folder / "tokens" / name / "tokens.bin")
        (folder / "tokens" / f"{name}.idx").symlink_to(folder / "tokens" / name / "tokens.idx")
    (folder / "mix.yaml").write_text(MIX)
    invoke("data", "plan", str(folder / "mix.yaml"), str(folder / "plan"))
    (folder / "run.yaml").write_text(RUN)
    return folder


@pytest.fixture(scope="module")
def trained(place):
    """What the run said, and where it lies."""
    return invoke("midtrain", str(place / "run.yaml")), place / "runs" / "anneal"


@pytest.mark.slow
def test_a_run_from_metas_files_to_megatrons(trained, place):
    said, folder = trained
    run = read_folder(folder)
    assert (run.status, run.steps, len(run.metrics), run.lacking) == ("finished", 25, 25, ())
    assert run.run["model"]["format"] == "meta" and run.run["tokens"] == 25 * 256
    assert [t["name"] for t in run.selftests][-1] == "update" and all(t["passed"] for t in run.selftests)
    losses = [m["ce"] for m in run.metrics]
    assert sum(losses[-5:]) < sum(losses[:5]) - 1
    assert [s["name"] for s in run.plan["sources"]] == ["prose", "more"]
    before, after = run.evals
    assert (before["step"], after["step"], after["tokens"]) == (0, 25, 6400)
    assert after["heldout"].keys() == {"prose", "more"}
    assert all(after["heldout"][n]["loss"] < before["heldout"][n]["loss"] - 1 for n in after["heldout"])
    assert after["heldout"]["prose"]["bpb"] > 0
    assert "25 steps, 6.4k tokens" in said and "self-test isolation: apart by" in said
    first, last, megatron = (
        folder / "export" / n for n in ("step000000020-hf", "step000000025-hf", "step000000025-megatron")
    )
    convert(megatron, place / "back", to="hf", vocab_size=640, sync=False)  # Megatron pads the vocabulary
    assert same(last, place / "back") and not same(first, last)
    resolved = yaml.safe_load((folder / "config.resolved.yaml").read_text())
    assert resolved["train"]["schedule"]["warmup"] == "8%" and resolved["train"]["clip_norm"] == 1.0


def test_how_much_is_told(place):
    """Nothing by --quiet; a log file holds what is decided and tested, and every step."""
    log, flags = place / "told.log", ["--set", "train.length=2", "--set", "export=[]"]
    words = ["midtrain", str(place / "run.yaml"), *flags, "--output"]
    assert invoke(*words, str(place / "hushed"), "--quiet") == ""
    said = invoke(*words, str(place / "told"), "--log-file", str(log))
    lines = [line.split(" INFO ", 1)[1] for line in log.read_text().splitlines()]
    assert [line for line in lines if line not in said.splitlines()] == []
    for begin in ("learning rate 0.003", "self-test causality", "step step=1 ", "step step=2 ", "eval step=2 "):
        assert sum(line.startswith(begin) for line in lines) == 1, begin


@pytest.mark.parametrize(("begun", "told"), [(0, None), (12, 12)])
def test_trackers_hear_where_a_run_goes_on(monkeypatch, tmp_path, begun, told):
    """So that the same run of Weights & Biases goes on, and TensorBoard hides what is written again."""
    heard = []
    for name in ("TensorBoard", "Wandb"):
        monkeypatch.setattr(trackers, name, lambda *given: heard.append(given[-1]))
    run = make_run({"model": {"path": "m"}, "data": {"plan": "p"}, "output": str(tmp_path),
                    "log": {"tensorboard": True, "wandb": "anneal"}})  # fmt: skip
    job = SimpleNamespace(run=run, begun=begun, course=SimpleNamespace(layout=SimpleNamespace(steps=20)))
    _views(job, as_json=False)
    assert heard == [told, told]


def test_the_same_settings_give_the_same_numbers(trained, place):
    """What was resolved is a run's YAML, too."""
    folder = trained[1]
    invoke("midtrain", str(folder / "config.resolved.yaml"), "--output", str(place / "again"), "--set", "export=[]")
    assert (place / "again" / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()
    said = invoke("midtrain", str(place / "run.yaml"), "--set", "resume=never", fails=True)
    assert "holds a run already" in said


def test_running_means_are_evaluated_and_leave_no_trace(trained, place):
    """As what is exported of them is, by itself."""
    sets = ["--set", "average={last: 2, ema: 0.5, every: 5}", "--set", "evaluation.every=10", "--set",
            "export={to: hf, dtype: fp32}", "--set", "skip_self_tests=[mesh, head, isolation]"]  # fmt: skip
    said = invoke("midtrain", str(place / "run.yaml"), "--output", str(place / "means"), *sets)
    run, plan = read_folder(place / "means"), str(place / "plan")
    assert (place / "means" / "metrics.jsonl").read_bytes() == (trained[1] / "metrics.jsonl").read_bytes()
    assert [(e["step"], [*e.get("averages", ())]) for e in run.evals] == [
        (0, []), (10, ["ema"]), (20, ["last", "ema"]), (25, ["last", "ema"])
    ]  # fmt: skip
    means = run.evals[-1]["averages"]
    assert f"averages/ema/heldout/prose/loss={means['ema']['heldout']['prose']['loss']:.6g}" in said
    table = next(t for t in tables([run], {}) if t.section == "Held-out loss")
    assert [row[0].text for row in table.rows][-3:] == ["means", "means, last", "means, ema"]
    for name, losses in [("", run.evals[-1]["heldout"]), *((f"-{n}", means[n]["heldout"]) for n in means)]:
        model = open_for_evaluation(str(place / "means" / "export" / f"step000000025-hf{name}"))
        alone = evaluate(model, Wanted(data=[plan], limit=64))[0]["heldout"]
        assert {n: x["loss"] for n, x in alone.items()} == pytest.approx({n: x["loss"] for n, x in losses.items()})
    assert len({losses["heldout"]["prose"]["loss"] for losses in (run.evals[-1], *means.values())}) == 3


def test_a_dry_run_measures_and_writes_nothing(place, monkeypatch):
    before = sorted(place.rglob("*"))
    found = json.loads(
        invoke("midtrain", str(place / "run.yaml"), "--dry-run", "--json", "--output", str(place / "dry"))
    )
    assert (found["steps"], found["tokens"]) == (25, 6400)
    assert found["stages"] == [{"first": 1, "steps": 25, "rows": 8, "length": 32, "micro_rows": 4, "accumulation": 2}]
    assert {s["name"]: s["epochs"] > 0 for s in found["sources"]} == {"prose": True, "more": True}
    assert found["memory"]["weights"] == 4 * found["parameters"] == found["memory"]["gradients"]
    assert found["memory"]["moments"] == 8 * found["trained"] and found["memory"]["activations"] > 0
    assert found["seconds"] == pytest.approx(25 * found["step_seconds"])
    assert found["rates"][0] == [1, pytest.approx(1.5e-3)] and found["rates"][-1][0] == 25
    assert sorted(place.rglob("*")) == before
    monkeypatch.setattr("surgery.midtraining.dry_run.free_memory", lambda: 1000)
    monkeypatch.setattr("surgery.writing.progress.EVERY", 0.0)
    text = invoke("midtrain", str(place / "run.yaml"), "--dry-run", "--output", str(place / "dry"))
    assert "1.0 kB are free besides the weights" in text and "it will not fit" in text
    assert "open, " in text and "kB/s" in text  # how much of the weights is read
    assert "█" in text and "learning rate, step 1 to 25" in text and "epochs of" in text


def test_what_cannot_be_is_refused_before_weights_are_read(place):
    def refused(*sets: str) -> str:
        words = [w for s in sets for w in ("--set", s)]
        return invoke(
            "midtrain", str(place / "run.yaml"), "--dry-run", "--output", str(place / "no"), *words, fails=True
        )

    assert "no whole number of micro-batches of 3" in refused("train.micro_batch=3")
    assert "learning rate is 0 in steps" in refused("train.schedule.offset=10")
    assert "is over, and every rate would be 0" in refused("train.schedule.offset=1859665")
    assert "more than the data have (25 steps, 6,400 tokens)" in refused("train.length=1B tokens")
    assert "did you mean 'micro_batch'?" in refused("train.microbatch=3")
    assert "start_lr is to be inherited, but the rate of meta is not recorded" in refused(
        "train.schedule.start_lr=inherit"
    )
    assert "100 tokens are no whole number of rows of 32" in refused("train.batch_tokens=100")
    small = tiny.save("llama", place / "small", l=2, h=48, f=40, v=264)
    assert "the data have a vocabulary of" in refused(f"model.path={small}")


def test_a_foreign_tokenizer_stops_the_run(place):
    """The same ids by another tokenizer: nothing but its file and the loss tell."""
    foreign = place / "foreign"
    tiny.save("llama", foreign, l=2, h=48, f=40, v=640)
    words = json.loads((TEXT / "tokenizer.json").read_text())
    (foreign / "tokenizer.json").write_text(json.dumps(words | {"version": "1.0 "}))
    said = invoke(
        "midtrain", str(place / "run.yaml"), "--set", f"model.path={foreign}", "--output", str(place / "f"), fails=True
    )
    assert "the data were made with another tokenizer than the model's" in said
    assert not (place / "f").exists()


def test_keys_are_explained_and_have_a_schema(place):
    text = invoke("midtrain", str(place / "run.yaml"), "--explain", "--set", "train.convention=olmo_core")
    assert '  path: "' in text and "# run.yaml" in text and 'decay: "olmo"  # convention olmo_core' in text
    assert make_run(yaml.safe_load(text)) == read_run(place / "run.yaml", ["train.convention=olmo_core"])[0]
    assert '- to: "hf"  # run.yaml' in text and "every: 20  # run.yaml" in text and 'dtype: "source"\n' in text
    lines = json.loads(invoke("midtrain", str(place / "run.yaml"), "--explain", "--json"))
    assert {"key": "train.clip_norm", "value": 1.0, "origin": ""}.items() <= {line["key"]: line for line in lines}[
        "train.clip_norm"
    ].items()
    defaults = invoke("midtrain", "--explain", "--set", "export.to=olmo")
    assert make_run(yaml.safe_load(defaults)).train == Train() and 'to: "olmo"  # --set' in defaults
    assert all(
        line.endswith("# to be given") for line in defaults.splitlines() if '"MODEL"' in line or '"PLAN"' in line
    )
    assert all(name in defaults for name in (*TESTS, MOVED))
    assert json.loads(invoke("midtrain", "--schema"))["title"] == "Run"
    assert "which run?" in invoke("midtrain", fails=True)


@pytest.mark.slow
def test_a_mixture_of_experts_is_watched(place):
    """The same data, an upcycled model: balance, loads and drift are told."""
    invoke("upcycle", str(place / "hf"), str(place / "moe"), "--experts", "4", "--top-k", "2", "--no-sync")
    sets = {"model.path": "moe", "output": "runs/moe", "train.length": "20", "export": "[]", "model.experts": "padded"}
    said = invoke("midtrain", str(place / "run.yaml"), *(w for k, v in sets.items() for w in ("--set", f"{k}={v}")))
    assert "self-test experts: apart from the plain loop by" in said
    run = read_folder(place / "runs" / "moe")
    assert run.metrics[-1]["balance"] >= 1 - 1e-6 and run.metrics[-1]["router"]["max_load"] >= 1
    assert [r["step"] for r in run.experts] == list(range(1, 21))
    last = run.experts[-1]
    assert last["by_source"].keys() == {"prose", "more"} and len(last["load"][0]) == 4
    assert last["weight_drift"][0] > run.experts[0]["weight_drift"][0] > 0
    assert run.evals[-1]["heldout"]["prose"]["loss"] < run.evals[0]["heldout"]["prose"]["loss"]


@pytest.mark.thorough
def test_a_run_begins_from_an_address(place, trained, monkeypatch, tmp_path):
    import boto3

    keys(monkeypatch, tmp_path)
    with moto() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        boto3.client("s3", endpoint_url=url).create_bucket(Bucket="bucket")
        push(place / "meta", "s3://bucket/meta")
        push(place / "plan", "s3://bucket/plan")
        output = place / "runs" / "from-address"
        sets = ("model.path=s3://bucket/meta", "data.plan=s3://bucket/plan", f"output={output}")
        invoke("midtrain", str(place / "run.yaml"), *(word for key in sets for word in ("--set", key)))
    assert json.loads((output / "run.json").read_text())["model"]["path"] == "s3://bucket/meta"
    found = [path.relative_to(output) for path in output.rglob("model.safetensors")]
    assert found
    for name in found:
        assert (output / name).read_bytes() == (trained[1] / name).read_bytes()
