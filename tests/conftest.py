"""Shared fixtures: one tiny model of each family per test session, and quiet, single-threaded libraries."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

# A shell starts what runs in the background with SIGINT ignored, and so do its children: the tests send some.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_hf("llama"): a Hugging Face folder that transformers wrote, made once per session.  Do not change it."""
    from tests import tiny

    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tiny.save(family, tmp_path_factory.mktemp(family) / family)
        return made[family]

    return get
