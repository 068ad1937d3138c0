"""Compiled loops are kept for the next process, and compiled again when any file of their folder has changed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("numba")

HEAD = "from surgery.merging.engine.kernels.compiled import compiled\n"
HELPER = HEAD + "@compiled\ndef factor(x):\n    return {} * x\n"
CALLER = HEAD + "from loops.helper import factor\n@compiled\ndef scaled(x):\n    return factor(x) + 1\n"
RUN = "from loops.caller import scaled; print(scaled(10.0), sum(scaled.stats.cache_hits.values()))"


@pytest.fixture
def loops(tmp_path):
    """A folder with a function and what it imports, and `run`: the result of the function, and cache hits."""
    folder = tmp_path / "loops"
    folder.mkdir()
    for name, text in {"__init__": "", "helper": HELPER.format("2"), "caller": CALLER}.items():
        (folder / f"{name}.py").write_text(text)

    def run(**more):
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.getcwd()}", "HOME": str(tmp_path / "home"), **more}
        environment = {k: v for k, v in environment.items() if v}
        done = subprocess.run(
            [sys.executable, "-c", RUN], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
        )
        value, hits = done.stdout.split()
        return float(value), int(hits)

    return folder, run


@pytest.mark.slow
def test_a_change_in_an_imported_file_is_seen(loops):
    folder, run = loops
    assert run(NUMBA_CACHE_DIR="") == (21.0, 0)
    assert run(NUMBA_CACHE_DIR="") == (21.0, 1)
    (folder / "helper.py").write_text(HELPER.format("3"))
    assert run(NUMBA_CACHE_DIR="") == (31.0, 0)
    assert len(list((folder / "__pycache__").glob("numba-*"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("given", ["elsewhere", ""])
def test_where_it_is_kept(loops, tmp_path, given):
    """Below NUMBA_CACHE_DIR, or in the user's cache if the folder cannot be written."""
    folder, run = loops
    if not given:
        (folder / "__pycache__").write_text("not a folder")
    place = tmp_path / given if given else tmp_path / "home/.cache/checkpoint-surgery"
    assert run(NUMBA_CACHE_DIR=str(place) if given else "") == (21.0, 0)
    assert run(NUMBA_CACHE_DIR=str(place) if given else "") == (21.0, 1)
    assert list(place.glob("numba-*/loops_*/*.nbi"))


@pytest.mark.slow
def test_nowhere_to_keep_it(loops, tmp_path):
    folder, run = loops
    (folder / "__pycache__").write_text("not a folder")
    (tmp_path / "home").write_text("not a folder")
    assert run(NUMBA_CACHE_DIR="") == (21.0, 0)
    assert run(NUMBA_CACHE_DIR="") == (21.0, 0)
