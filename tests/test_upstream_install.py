"""The environments of upstream programs: made once, and again when what they hold is said anew."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest

from tests.upstream import run
from tests.upstream.programs import Program, Source

PROGRAM = Program(("one==1", "two==2"), "load_one.py", (), without=("three",))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The place of an environment."""
    monkeypatch.setattr(run, "HOME", tmp_path / "home")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (tmp_path / "constraints.txt").write_text("torch==2.0\n")
    (tmp_path / "home" / "one").mkdir(parents=True)
    return tmp_path / "home" / "one"


@pytest.fixture
def ran(home, monkeypatch):
    """What is run in the place of pip; nothing is installed."""
    steps: list[str] = []

    def noted(words, **_):
        steps.append(" ".join(map(str, words)).replace(f"{home}", "HOME"))
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(run.subprocess, "run", noted)
    return steps


def install(monkeypatch, program: Program) -> str:
    monkeypatch.setattr(run, "PROGRAMS", {"one": program})
    return run.install("one")


def test_an_environment_is_made_once(ran, monkeypatch):
    for _ in range(2):
        assert install(monkeypatch, PROGRAM) == ""
    assert ran[0].endswith("-m venv HOME")
    assert ran[1:] == ["HOME/bin/pip -q install torch==2.0", "HOME/bin/pip -q install torch==2.0 one==1 two==2",
                       "HOME/bin/pip -q uninstall -y three"]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"packages": ("one==1", "two==3")}, {"without": ()}, {"without": ("three", "four")}, {"python": "3.12"}],
)
def test_an_environment_is_made_again_for_other_packages(change, ran, monkeypatch):
    install(monkeypatch, PROGRAM)
    before = len(ran)
    assert install(monkeypatch, replace(PROGRAM, **change)) == ""
    assert len(ran) > before


def test_a_program_without_its_python_or_its_source_is_skipped(home, tmp_path, monkeypatch):
    assert install(monkeypatch, replace(PROGRAM, python="0.1")) == "needs python0.1, which is not here"
    source = Source(str(tmp_path / "nowhere"), "abc", "ONE_HOME")
    assert "ONE_HOME may name a checkout" in install(monkeypatch, replace(PROGRAM, source=source))
    assert not list(home.iterdir())


def test_a_program_that_is_no_package_is_fetched_once(home, tmp_path, monkeypatch):
    origin = tmp_path / "origin"
    git = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@b"]
    (origin / "megatron").mkdir(parents=True)
    subprocess.run([*git, "init", "-q"], check=True)
    monkeypatch.delenv("ONE_HOME", raising=False)
    for text in ("x = 1\n", "x = 2\n"):  # once for each commit
        (origin / "megatron" / "x.py").write_text(text)
        for words in (["add", "."], ["commit", "-qm", "x"]):
            subprocess.run([*git, *words], check=True)
        commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        monkeypatch.setattr(run, "PROGRAMS", {"one": replace(PROGRAM, source=Source(str(origin), commit, "ONE_HOME"))})
        assert run.fetch("one") == ""
        assert (home / "source" / "megatron" / "x.py").read_text() == text
    (origin / ".git").rename(tmp_path / "gone")
    assert run.fetch("one") == "" and run.environment("one")["ONE_HOME"] == str(home / "source")
    monkeypatch.setenv("ONE_HOME", "elsewhere")
    assert run.environment("one")["ONE_HOME"] == "elsewhere"
