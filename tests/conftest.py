"""Shared fixtures: one tiny model of each family per test session, and quiet, single-threaded libraries."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The URL of an S3 server."""
    from tests.buckets import moto

    with moto() as url:
        yield url


@pytest.fixture
def bucket(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """tests.buckets.Bucket: an empty one, to which the environment leads."""
    from tests.buckets import bucket_before

    with bucket_before(s3, monkeypatch, tmp_path / "cache") as found:
        yield found
