"""A run's YAML: strict keys, amounts, conventions, --set, what is explained; and how it becomes steps."""

from __future__ import annotations

import json

import numpy as np
import pytest

from surgery.data.rows import IGNORE, Rows
from surgery.errors import ConfigError, UsageError
from surgery.midtraining.amounts import Amount, parse_amount, parse_rate
from surgery.midtraining.batching import lay_out, micro_batches, rows_of
from surgery.midtraining.conventions import CONVENTIONS, preset
from surgery.midtraining.course import Course
from surgery.midtraining.run_file import explained, make_run, read_run
from surgery.midtraining.settings import Run

PLAIN = {"model": {"path": "m"}, "data": {"plan": "p"}, "output": "out"}


def write(path, text):
    path.write_text(text)
    return path


def test_every_mistake_is_named_with_its_line(tmp_path):
    path = write(tmp_path / "run.yaml", """
model: {pth: m}
data: {plan: p, recorded: r}
output: out
train:
  micro_batch: 0
  batch_tokens: {1M: 2M}
  schedul: {start_lr: 3e-4}
  optimizer: {betas: [0.9, 1.2], decay: lama}
  schedule: {warmup: 3 parsecs, start_lr: fast}
moe: {rule: olmo_core, coefficients_of: megatron}
""")  # fmt: skip
    with pytest.raises(ConfigError) as error:
        read_run(path)
    for said in ("line 2: key 'pth' is not known; did you mean 'path'?", "line 2: model.path is missing",
                 "line 3: data: give exactly one of plan, mixture, recorded and sources, not plan and recorded",
                 "line 6: train.micro_batch is 0", "line 7: train.batch_tokens: {'1M': '2M'} does not say",
                 "line 8: key 'schedul' is not known; did you mean 'schedule'?",
                 "line 9: train.optimizer.betas.1 is 1.2", "line 9: train.optimizer.decay is 'lama'",
                 "line 10: train.schedule.warmup: '3 parsecs' is no amount", "line 10: train.schedule.start_lr",
                 "line 11: moe: with the rule of olmo_core coefficients are olmo_core's"):  # fmt: skip
        assert said in str(error.value), said


def test_set_changes_keys_and_is_explained(tmp_path):
    path = write(tmp_path / "run.yaml", "model: {path: m}\ndata: {plan: /p}\noutput: out\ntrain: {convention: hf}\n")
    run, origins = read_run(path, ["train.micro_batch=4", "export={to: megatron, tp: 2}", "train.z_loss=1e-4"])
    assert (run.train.micro_batch, run.export[0].to, run.export[0].tp, run.train.z_loss) == (4, "megatron", 2, 1e-4)
    assert (run.model.path, run.data.plan, run.output) == (str(tmp_path / "m"), "/p", str(tmp_path / "out"))
    lines = {line.key: line for line in explained(run, origins)}
    assert lines["train.micro_batch"].origin == "--set" and lines["train.micro_batch"].value == 4
    assert lines["train.optimizer.decay"].origin == "convention hf" and lines["train.optimizer.decay"].value == "hf"
    assert lines["train.z_loss"].origin == "--set"  # over the convention
    assert lines["model.path"].origin == "run.yaml" and lines["train.clip_norm"].origin == ""
    assert [line.key for line in lines.values() if not line.meaning] == []
    for bad in ("train.micro_batch", "train..x=1", "model.path.x=1"):
        with pytest.raises(UsageError, match="--set"):
            read_run(path, [bad])


def test_what_is_resolved_can_be_read_again(tmp_path):
    value = {**PLAIN, "train": {"batch_tokens": {0: "1M", "2B": 4e6}, "length": "50B tokens", "convention": "olmo",
                                "schedule": {"warmup": "2%", "final_lr": "10%", "start_lr": 3e-5}}}  # fmt: skip
    run = make_run(value, tmp_path)
    assert run.train.batch_tokens == {0: 10**6, 2 * 10**9: 4 * 10**6}
    assert make_run(json.loads(run.model_dump_json())) == run
    assert set(Run.model_json_schema()["properties"]) == set(Run.model_fields)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_conventions_set_keys_that_exist_and_give_way_to_what_is_said(name):
    given = {**PLAIN, "train": {"convention": name}}
    _, origins = preset(given)
    assert origins.keys() == CONVENTIONS[name].keys()
    run = make_run(given)
    plain = run.model_dump(mode="json")
    for key, value in CONVENTIONS[name].items():
        found = plain
        for part in key.split("."):
            found = found[part]
        assert found == value, key
        *path, leaf = key.split(".")
        said = {leaf: getattr(_at(make_run(PLAIN), path), leaf)}
        for part in reversed(path):
            said = {part: said}
        said = {**given, **said, "train": {**given["train"], **said.get("train", {})}}
        assert preset(said)[1].keys() == CONVENTIONS[name].keys() - {key}


def _at(run, path):
    for part in path:
        run = getattr(run, part)
    return run


def test_amounts():
    assert parse_amount(1000) == Amount(1000, "steps") == parse_amount("1000 steps") == parse_amount("1k")
    assert (
        parse_amount("2.5B tokens") == Amount(2.5e9, "tokens")
        and str(parse_amount("2.5B tokens")) == "2500000000 tokens"
    )
    assert parse_amount("12.5%").steps(lambda n: 0, 1000) == 125
    assert parse_amount(str(parse_amount("12.5%"))) == Amount(0.125, "share")
    assert parse_rate("10%").of(3e-4) == pytest.approx(3e-5) and parse_rate(1e-4).of(1.0) == 1e-4
    for bad in ("1.5 steps", "-3", "10% tokens", True, None, "1e"):
        with pytest.raises(ValueError, match=r"amount|whole number"):
            parse_amount(bad)
    for bad in ("fast", -1, "110", 20):
        with pytest.raises(ValueError, match="learning rate"):
            parse_rate(bad)


# ------------------------------------------------------------------------------------------------------------- steps


class Numbered:
    """A source whose tokens say where they are: row r of step s holds s * 1000 + r * 100 and what follows."""

    sources = ("numbers",)

    def __init__(self, steps: int = 10, rows: int = 4, length: int = 12) -> None:
        self.steps, self.rows_per_step, self.sequence_length = steps, rows, length

    def __len__(self) -> int:
        return self.steps

    def rows(self, step: int, rank: int = 0, world: int = 1) -> Rows:
        numbers = np.arange(rank, self.rows_per_step, world)
        tokens = step * 1000 + numbers[:, None] * 100 + np.arange(self.sequence_length)
        positions = np.tile(np.r_[np.arange(7), np.arange(self.sequence_length - 7)], (len(numbers), 1))
        labels = np.concatenate([tokens[:, 1:], np.full((len(numbers), 1), IGNORE)], 1)
        return Rows(tokens, labels, positions, np.zeros(len(numbers), int), numbers)


def test_a_run_as_long_as_its_data_or_as_it_should_be():
    assert lay_out(10, 4, 12, {}, {}, None).steps == 10
    half = lay_out(10, 4, 12, {}, {}, parse_amount("50%"))
    assert (half.steps, half.tokens) == (5, 240)
    assert lay_out(10, 4, 12, {}, {}, parse_amount("100 tokens")).steps == 3  # 144: whole steps
    assert lay_out(10, 4, 12, {}, {}, parse_amount(7)).steps == 7
    for bad in ("11", "481 tokens"):
        with pytest.raises(ConfigError, match="more than the data have"):
            lay_out(10, 4, 12, {}, {}, parse_amount(bad))
    with pytest.raises(ConfigError, match="has no step"):
        lay_out(0, 4, 12, {}, {}, None)
    with pytest.raises(ConfigError, match="cut into pieces of 5"):
        lay_out(10, 4, 12, {}, {0: 5}, None)


def test_stages_take_every_unit_once_in_order():
    layout = lay_out(11, 4, 12, {0: 48, 90: 96, 300: 144}, {0: 6, 100: 12}, None)
    taken, tokens = [], 0
    for step in range(layout.steps):
        stage = layout.stage(step)
        assert layout.tokens_before(step) == tokens
        first = stage.unit + (step - stage.first) * stage.units
        taken += range(first, first + stage.units)
        tokens += layout.tokens_of(stage)
    assert taken == list(range(len(taken))) and 11 - len(taken) < 3
    assert [layout.stage(s).units for s in range(layout.steps)] == [1, 1, 2, 2, 2, 3]
    assert [layout.stage(s).length for s in range(layout.steps)] == [6, 6, 6, 12, 12, 12]
    assert [layout.steps_of(n) for n in (1, 48, 49, 96, 97)] == [1, 1, 2, 2, 3]
    assert lay_out(11, 4, 12, {0: 144, 600: 48}, {}, None).steps == 3  # a smaller batch does not begin before its token


def test_rows_are_the_same_for_any_number_of_ranks_and_lose_no_token():
    source, layout = Numbered(), lay_out(10, 4, 12, {0: 96}, {0: 6, 96: 12}, None)
    for step in range(3):
        whole = rows_of(source, layout, step)
        parts = [rows_of(source, layout, step, rank, 2) for rank in range(2)]
        assert sorted(map(tuple, np.concatenate([p.tokens for p in parts]))) == sorted(map(tuple, whole.tokens))
        assert whole.tokens.size == 96
    first = rows_of(source, layout, 0)
    assert first.tokens.shape == (16, 6) and first.tokens[1].tolist() == [6, 7, 8, 9, 10, 11]
    assert first.positions[:2].tolist() == [[0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 4]]  # a document begins at place 7
    assert first.labels[0].tolist() == [1, 2, 3, 4, 5, 6]
    pieces = list(micro_batches(first, 6, "cpu"))
    assert [len(p.tokens) for p in pieces] == [6, 6, 4] and pieces[0].positions is not None


def course(world: int = 1, rows: int = 4, **train):
    train = {"schedule": {"start_lr": 1e-3, **train.pop("schedule", {})}, **train}
    return Course.of(make_run({**PLAIN, "train": train}).train, Numbered(rows=rows), world, 1e-3)


def test_batches_are_divided_among_devices_and_micro_batches():
    assert (course().micro, course().accumulation(0)) == (4, 1)
    assert (course(world=2, micro_batch=1).micro, course(world=2, micro_batch=1).accumulation(0)) == (1, 2)
    with pytest.raises(ConfigError, match=r"4 rows cannot be divided among 3 processes"):
        course(world=3)
    with pytest.raises(ConfigError, match=r"no whole number of micro-batches of 3") as error:
        course(micro_batch=3)
    assert "train.micro_batch: 1, 2, 4" in str(error.value)


def test_a_schedule_in_steps_tokens_or_shares():
    made = course(schedule={"name": "wsd", "warmup": "96 tokens", "decay": "30%", "final_lr": "10%"})
    assert (made.schedule.warmup, made.schedule.decay, made.schedule.steps) == (2, 3, 10)
    assert made.schedule.final == pytest.approx(1e-4)
    longer = course(schedule={"name": "linear", "length": 40}).schedule
    assert longer(1) == 1e-3 and longer(10) == pytest.approx(1e-3 * 31 / 40)
    shorter = course(schedule={"name": "linear", "length": "50%"})
    assert shorter.schedule.idle(shorter.layout.steps) == [6, 7, 8, 9, 10]
    with pytest.raises(ConfigError, match="warm-up of 8 and decay of 3 steps in 10"):
        course(schedule={"name": "wsd", "warmup": 8, "decay": 3})


def test_a_key_of_several_kinds_is_named_as_it_is_written():
    with pytest.raises(ConfigError) as error:
        course(schedule={"start_lr": "abc"})
    assert str(error.value).startswith("train.schedule.start_lr: 'abc' is no learning rate: write 3e-5, or '10%'")
    assert "[" not in str(error.value)


def test_a_schedule_that_goes_on_behind_the_run():
    """Its tokens beyond the run are counted on, at the batch of the last stage."""
    made = course(schedule={"name": "linear", "length": "1920 tokens"}).schedule
    assert made.steps == 40 and made(10) == pytest.approx(1e-3 * 31 / 40)
    growing = course(batch_tokens={0: 48, 240: 96}, length=4, schedule={"name": "linear", "length": "480 tokens"})
    assert growing.layout.steps == 4 and len(growing.layout.taken) == 1
    assert growing.schedule.steps == 5 + 3  # 5 steps of 48, then of 96
    later = course(batch_tokens={0: 48, 960: 96}, schedule={"name": "linear", "length": "1152 tokens"})
    assert later.layout.steps == 10  # the data end before the batch grows
    assert later.schedule.steps == 20 + 2
    for name in ("linear", "cosine", "constant"):
        for warmup in (11, "200%", "1B tokens"):
            with pytest.raises(ConfigError, match=r"warm-up of \d+ and decay of 0 steps in 10"):
                course(schedule={"name": name, "warmup": warmup})
