"""Values of keys that are tried side by side, in processes of their own; and fp8, where there is none."""

from __future__ import annotations

import json
import statistics

import pytest
import torch
from click.testing import CliRunner

from surgery.cli.main import main
from surgery.containers.yaml_writer import to_yaml
from surgery.errors import SurgeryError, UsageError
from surgery.midtraining.fp8 import check_fp8
from surgery.midtraining.loop import fresh_state, prepare, train
from surgery.midtraining.report.tables import tables
from surgery.midtraining.run_file import make_run
from surgery.midtraining.run_folder import RUN, SWEEP, read_folder
from surgery.midtraining.sweep import Trial, _Enough, _Timed, measure, parse_grid
from surgery.units import human
from surgery.writing.atomic import write_json
from tests import tiny
from tests.test_midtrain_loop import Kept, record, settings


def test_keys_need_no_section():
    said = ["micro_batch=2,4", "compile=true,false", "model.experts=loop", "attention=full", "data.seed=1,2"]
    grid = parse_grid(said)
    assert grid == {"train.micro_batch": ["2", "4"], "train.compile": ["true", "false"], "model.experts": ["loop"],
                    "attention": ["full"], "data.seed": ["1", "2"]}  # fmt: skip
    for wrong in (["micro_batch"], ["micro_batch="], [f"micro_batch={','.join(map(str, range(65)))}"]):
        with pytest.raises(UsageError):
            parse_grid(wrong)


def test_the_first_steps_are_not_timed():
    log = _Timed(6)
    for step, seconds in enumerate((9.0, 5.0, 1.0, 2.0, 4.0), 1):
        log.step({"tokens": 100 * step, "loss": 3.0 - step}, {"seconds": seconds})
    with pytest.raises(_Enough):
        log.step({"tokens": 600, "loss": -3.0}, {"seconds": 1.0})
    assert log.rate() == statistics.median((100, 50, 25, 100)) and log.loss == -3.0


@pytest.mark.slow
def test_a_sweep_says_what_each_comes_to_and_goes_on_where_one_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model, batches = tiny.save("llama", tmp_path / "m", l=1, h=48, f=40), record(tmp_path / "b.npz", False, False)
    said = settings(model, batches, tmp_path / "run")
    (tmp_path / "run.yaml").write_bytes(to_yaml(said))
    done = CliRunner().invoke(main, ["midtrain", str(tmp_path / "run.yaml"), "--json", "--steps", "3",
                                     "--sweep", "micro_batch=3"])  # fmt: skip
    assert done.exit_code == 0, done.output
    [good] = json.loads(done.stdout)
    other = make_run({**said, "train": {**said["train"], "micro_batch": 4}})
    bad = measure({"train.micro_batch": "4"}, other, 3).to_json()
    job, kept = prepare(make_run(said)), Kept()
    train(job, fresh_state(job), kept)
    assert good["loss"] == pytest.approx(kept.steps[2]["loss"], rel=1e-5) and good["tokens"] == kept.steps[2]["tokens"]
    assert good["steps"] == 3 and good["tokens_per_second"] > 0 and good["memory"] > 1 << 26
    assert "no whole number of micro-batches" in bad["failed"] and bad["loss"] is None
    (tmp_path / "run" / RUN).write_text("{}")
    write_json(tmp_path / "run" / SWEEP, {"steps": 3, "trials": [good, bad]})
    [table] = [t for t in tables([read_folder(tmp_path / "run")], {}) if t.section == "Speed"]
    assert [cell.text for cell in table.rows[0]][:2] == ["3", f"{good['tokens_per_second']:,.0f}"]
    assert table.rows[0][1].kind == "best" and "micro-batches" in table.rows[1][-1].text
    wrong = CliRunner().invoke(main, ["midtrain", str(tmp_path / "run.yaml"), "--sweep", "micro_batchs=3"])
    assert wrong.exit_code == 1 and "micro_batchs" in wrong.output
    assert "what is b.yaml" in CliRunner().invoke(main, ["midtrain", "a.yaml", "b.yaml"]).output


def test_people_see_a_table(capsys):
    from surgery.cli.show_midtraining import trials

    good = Trial({"train.compile": "true"}, 3, 300, 1234.5, 5 << 20, 2.5)
    trials([good, Trial({"train.compile": "no"}, failed="why")])
    said = capsys.readouterr().out
    assert all(text in said for text in ("compile", "1,234", "2.5000", "why", human(5 << 20)))


def test_fp8_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr("surgery.midtraining.fp8.find_spec", lambda name: None)
    with pytest.raises(SurgeryError, match="needs torchao"):
        check_fp8("cuda")
    monkeypatch.setattr("surgery.midtraining.fp8.find_spec", lambda name: object())
    with pytest.raises(SurgeryError, match="needs a GPU"):
        check_fp8("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(SurgeryError, match="A100 has no fp8"):
        check_fp8("cuda")
