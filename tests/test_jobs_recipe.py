"""A recipe says what it means: the YAML's schema, names in commands and configs, the order of steps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from surgery.cli.main import main
from surgery.errors import ConfigError, FileError, SurgeryError, UsageError
from surgery.jobs.graph import graph_of
from surgery.jobs.names import Several, Thing, text, value, words
from surgery.jobs.recipe import laid_over, read_recipe
from surgery.jobs.spec import read_resources, seconds
from surgery.jobs.step import near

DOCS = Path(__file__).parent.parent / "docs"
A, B = Thing("one-1", Path("/x/a b")), Thing("one-2", Path("/x/b"))
NAMES = {"n": 3, "flag": True, "list": [1, "a b"], "one": Several((({"seed": 1}, A), ({"seed": 2}, B))), "one-1": A}


def shown(thing: Thing) -> str:
    return str(thing.path)


@pytest.mark.parametrize(("line", "expected"), [
    (["$n", "${n}x", "$$n", "$flag"], ["3", "3x", "$n", "true"]),
    (["$list"], ["1", "a b"]),
    (["$one", "x=$one/y"], ["/x/a b", "/x/b", "x=/x/a b/y", "x=/x/b/y"]),
    (["${one-1}", "$", "5 $ 6"], ["/x/a b", "$", "5 $ 6"]),
])  # fmt: skip
def test_words(line, expected):
    assert words(line, NAMES, shown) == expected


def test_values_keep_their_types_and_lists_are_filled():
    assert value({"a": "$n", "b": ["$one"], "c": "$n$n", "d": {"e": "$list"}, "f": None}, NAMES, shown) == {
        "a": 3, "b": ["/x/a b", "/x/b"], "c": "33", "d": {"e": [1, "a b"]}, "f": None,
    }  # fmt: skip


def test_an_entry_that_mentions_several_runs_has_the_values_of_each():
    names = {"one": Several((({"seed": 1}, A), ({"seed": 2}, B)))}
    assert value([{"model": "$one", "weight": "$seed"}], names, shown) == [
        {"model": "/x/a b", "weight": 1}, {"model": "/x/b", "weight": 2}]  # fmt: skip


def test_several_things_in_one_text_are_refused():
    with pytest.raises(ConfigError, match=r"\$one stands for 2 things: \$\{one-1\}"):
        text("$one", NAMES, shown)
    with pytest.raises(ConfigError, match=r"there is no \$m"):
        text("$m", NAMES, shown)


def recipe(tmp_path, text, name="r.yaml", **kw):
    (tmp_path / name).write_text(text)
    return read_recipe(tmp_path / name, folder=str(tmp_path / "run"), **kw)


def graph(tmp_path, text, **kw):
    return graph_of(recipe(tmp_path, text, **kw), "r.yaml")


MATRIX = """
inputs: {mix: mix.txt}
vars: {lr: 3.0e-5, seeds: [42, 666]}
steps:
  soup: {surgery: soup $config $out, config: {models: [{model: "${train.hf}", seed: $seed}]}}
  train:
    matrix: {seed: $seeds}
    surgery: midtrain $config
    config: {data: {seed: $seed}, lr: $lr, plan: $mix, output: $out}
    outputs: {out: train/$seed, hf: "train/$seed-hf"}
  check: {matrix: {seed: $seeds}, surgery: "verify ${train.hf} $soup"}
  last: {surgery: "eval $check ${train-42}", after: check}
"""


def test_steps_are_put_in_order_and_runs_of_a_matrix_meet_their_like(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mix.txt").write_text("x")
    text = MATRIX.replace("$check ", "")
    steps = graph(tmp_path, text)
    by = {s.id: s for s in steps}
    assert [*by] == ["train-42", "train-666", "soup", "check-42", "check-666", "last"]
    assert by["soup"].needs == ("train-42", "train-666")
    assert by["check-666"].needs == ("train-666", "soup")
    assert by["last"].needs == ("train-42", "check-42", "check-666")
    assert by["check-666"].command(near) == ["verify", "run/train/666-hf", "run/soup"]
    config = by["train-666"].config(near)
    assert config == {"data": {"seed": 666}, "lr": 3e-5, "plan": "mix.txt", "output": "run/train/666"}
    models = [{"model": "run/train/42-hf", "seed": 42}, {"model": "run/train/666-hf", "seed": 666}]
    assert by["soup"].config(near) == {"models": models}


def test_a_step_that_makes_nothing_is_no_name(tmp_path):
    with pytest.raises(ConfigError, match=r"step last: there is no \$check"):
        graph(tmp_path, MATRIX)


def test_set_and_small_change_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = MATRIX.replace("$check ", "") + "small: {vars: {seeds: [7]}, steps: {last: null}}\n"
    assert [s.id for s in graph(tmp_path, text, small=True)] == ["train-7", "soup", "check-7"]
    steps = graph(tmp_path, text, sets=["lr=1", "soup=elsewhere/s", "seeds=[42, 3]"])
    by = {s.id: s for s in steps}
    assert "soup" not in by
    assert by["check-3"].command(near) == ["verify", "run/train/3-hf", "elsewhere/s"]
    assert by["train-42"].config(near)["lr"] == 1
    for wrong, match in (("lr", "write --set NAME=VALUE"), ("lt=3", "no such name")):
        with pytest.raises(UsageError, match=match):
            recipe(tmp_path, text, sets=[wrong])
    with pytest.raises(UsageError, match="has no small twin"):
        recipe(tmp_path, MATRIX, small=True)


def test_a_recipe_may_be_laid_over_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(MATRIX.replace("$check ", "") + "small: {vars: {seeds: [7]}}\n")
    text = "base: base.yaml\nvars: {lr: 1}\nsteps: {last: null}\n"
    by = {s.id: s for s in graph(tmp_path, text)}
    assert [*by] == ["train-42", "train-666", "soup", "check-42", "check-666"]
    assert by["train-42"].config(near)["lr"] == 1
    assert [s.id for s in graph(tmp_path, text, small=True)] == ["train-7", "soup", "check-7"]
    (tmp_path / "chained.yaml").write_text("base: base.yaml")
    for wrong in ("base: chained.yaml", "base: ../base.yaml", "base: [1]"):
        with pytest.raises(ConfigError, match="base"):
            recipe(tmp_path, wrong)


def test_laid_over():
    assert laid_over({"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": None, "e": 3}, "d": 4}) == {
        "a": {"c": 2, "e": 3}, "d": 4}  # fmt: skip


def test_everything_that_is_wrong_is_said_once_with_its_line(tmp_path):
    with pytest.raises(ConfigError) as caught:
        recipe(tmp_path, """\
inputs: {a: a.txt, b c: x}
stepz: {}
vars: {one: 3}
steps:
  two: {surgery: convert $one --to meta, sheel: 3}
  out: {shell: ls}
  three: {shell: ls, surgery: x}
  four: {surgery: "convert 'x"}
  six: [1]
""")  # fmt: skip
    said = str(caught.value)
    for line, what in ((1, "'b c' is no name"), (2, "no field 'stepz'"), (5, "no field 'sheel'"), (6, "out means"),
                       (7, "not surgery and shell"), (8, "No closing quotation"), (9, "it is <list>")):  # fmt: skip
        assert re.search(rf"line {line}: .*{re.escape(what)}", said), said
    assert "did you mean" in said


WRONG = {
    "steps: {a: {shell: 'cat $b > $out'}, b: {shell: 'cat $a > $out'}}": "wait for each other: a -> b -> a",
    "steps: {a: {shell: 'cat $a > x'}}": r"there is no \$a",
    "{vars: {a: 1}, steps: {a: {shell: ls}}}": "a is both a variable and a step",
    "steps: {a: {shell: 'touch $out', outputs: {out: ../x}}}": "does not lie in the run's folder",
    "steps: {a: {shell: 'touch $out', outputs: {out: steps/x}}}": "outside of steps/",
    "steps: {a: {shell: 'touch $out', outputs: {out: x}}, b: {shell: 'touch $out', outputs: {out: x/y}}}": "lies in",
    "steps: {a: {shell: 'touch $out', outputs: {out: x}}, b: {shell: 'touch $out', outputs: {out: x}}}": "a, b",
    "steps: {a: {shell: ls, matrix: {s: 3}}}": "s is 3, not a list of values",
    "steps: {a: {shell: ls, matrix: {s: [a/b]}}}": "cannot be the name of a run",
    "steps: {a: {shell: ls, after: b}}": "there is no step b",
    "steps: {a: {shell: ls, resources: {time: 3 moons}}}": "'3 moons' is no time",
    "steps: {a: {surgery: convert r.yaml}}": "r.yaml is a file and no input",
    "{inputs: {a: '*.none'}, steps: {a1: {shell: ls}}}": "no file fits",
    "steps: {}": "there are no steps",
    "[1]": "not keys and values",
}


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_what_cannot_be_run_is_refused(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=WRONG[text]):
        graph(tmp_path, text)


@pytest.mark.parametrize("text", ["a: &a 1\nb: *a", "steps: {a: {shell: ls}, a: {shell: ls}}", "a: [", "\x00"])
def test_a_hostile_yaml_is_an_error(tmp_path, text):
    with pytest.raises(SurgeryError):
        recipe(tmp_path, text)


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(FileError, match="No such file"):
        read_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(("text", "expected"), [
    ("12h", 43200), ("90min", 5400), ("2d", 172800), ("12:00:00", 43200), ("1-12:00:00", 129600),
    (77, 77),
])  # fmt: skip
def test_times(text, expected):
    assert seconds(text) == expected


def test_resources():
    found = read_resources({"time": "1h", "memory": "64GB", "gpus": 8, "nodes": 2})
    assert (found.time, found.memory, found.gpus, found.nodes, found.chain) == (3600, 64_000_000_000, 8, 2, 1)


UNFIT = """
inputs: {model: model}
steps:
  flag: {surgery: convert $model $out --to meta --tpp 2}
  format: {surgery: convert $model $out --to mta}
  number: {surgery: convert $model $out --to meta --tp two}
  missing: {surgery: convert $model $out}
  more: {surgery: verify $model $model $model}
  name: {surgery: data shw $model --step 1}
  none: {surgery: data}
  global: {surgery: "-q formats"}
  key:
    surgery: midtrain $config --set data.plan=x
    config: {model: {path: $model}, output: $out, train: {sed: 1}}
"""
REFUSED = """r.yaml: step flag: No such option '--tpp'. (Did you mean one of: '--pp', '--tp', '--vpp'?)
  step format: there is no format 'mta'
  step number: Invalid value for '--tp': 'two' is not a valid integer range.
  step missing: Missing option '--to'.
  step more: surgery verify: what is {model}?
  step name: No such command 'shw'. Did you mean 'show'?
  step none: Missing command.
  step global: No such option '-q'.
  step key: key 'sed' is not known; did you mean 'seed'?
"""
SOUND = """
inputs: {model: model}
steps:
  several: {surgery: report $model $model -o $out -q}
  none: {surgery: formats --json}
  version: {surgery: --version}
  help: {surgery: data plan --help}
  key: {surgery: "midtrain $config --output $out", config: {model: {path: $model}, data: {plan: x}}}
"""


@pytest.mark.parametrize(
    "command", [("run", "--dry-run"), ("launch", "--scheduler", "slurm", "--write-only", "scripts")]
)
def test_commands_that_surgery_refuses_are_named_before_the_first_step(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("r.yaml").write_text(UNFIT)
    done = CliRunner().invoke(main, [*command, "r.yaml"])
    assert done.exit_code == 1 and REFUSED.format(model=tmp_path / "model") in done.stderr
    Path("r.yaml").write_text(SOUND)
    done = CliRunner().invoke(main, [*command, "r.yaml"], catch_exceptions=False)
    assert done.exit_code == 0 and "several" in done.output
    assert not Path("runs").exists() or command[0] == "launch"


@pytest.mark.parametrize("page", ["recipes", "tutorial"])
def test_recipes_of_the_pages_are_sound(tmp_path, monkeypatch, page):
    """Every one that has steps; what it names from elsewhere is there."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "mix", "SmolLM2-135M", "tiny", "Llama-3.2-1B", "text"):
        Path(name).mkdir()
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.S)
    recipes = [block for block in blocks if re.search("^steps:", block, re.M)]
    assert recipes
    for block in recipes:
        Path("r.yaml").write_text(block if "\ninputs:" in block else f"inputs: {{model: model, mix: mix}}\n{block}")
        done = CliRunner().invoke(main, ["run", "--dry-run", "r.yaml"])
        assert done.exit_code == 0, done.output
