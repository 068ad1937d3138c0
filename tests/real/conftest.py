"""Tests on a real model, which need minutes and gigabytes: only `make test-real` runs them."""

from __future__ import annotations

import os

import pytest

collect_ignore_glob = [] if os.environ.get("SURGERY_REAL") else ["test_*.py"]
FIGURES = pytest.StashKey[list[str]]()


@pytest.fixture
def figure(request):
    """figure("..."): a line of measured figures, printed after the tests."""
    return request.config.stash.setdefault(FIGURES, []).append


def pytest_terminal_summary(terminalreporter, config):
    for line in config.stash.get(FIGURES, []):
        terminalreporter.write_line(line)
