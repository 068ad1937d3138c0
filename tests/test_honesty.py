"""`verify` calls no two models the same whose logits differ: a sample of `make test-honesty`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import surgery
from tests import honesty, tiny


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "gpt_neox"])
def test_no_lie_in_a_sample(family: str, tmp_path: Path) -> None:
    tally = honesty.judge(family, tmp_path, sample=20, seed=1)
    assert not tally.lies
    assert tally.tried == 20 > tally.refused


def test_a_lie_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.save("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    one, other = (honesty.build(source, tmp_path / str(eps), {**config, "rms_norm_eps": eps}) for eps in (1e-5, 0.1))
    tally = honesty.Tally()
    honesty.ask(tally, "eps", one, other)
    assert not tally.lies
    monkeypatch.setattr(
        surgery, "verify", lambda a, b: SimpleNamespace(same=True, alike=True, verdict="the same model")
    )
    honesty.ask(tally, "eps", one, other)
    assert len(tally.lies) == 1
