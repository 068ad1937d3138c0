"""Logits compared in less memory than a model takes: by rows of its matrices, as whole models say it."""

from __future__ import annotations

import pytest
import torch

from surgery.errors import UsageError
from surgery.formats.registry import open_checkpoint
from surgery.running import whole
from surgery.running.loading import load
from surgery.verification.logits import compare_logits
from surgery.verification.streamed import prepared, room
from tests import tiny

FEW = ("llama_tied", "mixtral", "gpt2", "glm4_moe")


@pytest.mark.parametrize(
    "family", [f if f in FEW else pytest.param(f, marks=pytest.mark.thorough) for f in tiny.FAMILIES]
)
def test_blocks_of_rows_give_the_logits_of_whole_models(family, tmp_path):
    folder = tiny.save(family, tmp_path / "model", l=3 if family not in ("olmo3", "ernie4_5_moe", "qwen2_moe") else 6)
    tokens = whole.fixed_tokens(264)
    wanted = whole.run(load(folder), tokens)
    for own in (True, False):
        one = prepared(open_checkpoint(folder), own)
        got = one.run(tokens, 1 << 14)
        assert whole.gap(wanted.logits, got.logits) < 1e-5
        assert max(whole.gaps(got.outputs, wanted.outputs).values()) < 1e-5
        assert {"embed", "layers.1", "final_norm", "lm_head"} <= got.outputs.keys()
        assert all(p.is_meta for p in one.model.parameters())


def test_a_model_that_is_larger_than_the_memory_is_compared(tmp_path):
    a, b = (tiny.save("mixtral", tmp_path / name, m=112) for name in "ab")
    told: list[str] = []
    same = compare_logits(a, b, max_memory=6 << 20, tell=told.append)
    assert same.same
    assert same.bit_equal
    assert any("streamed" in line for line in told)
    other = tiny.save("mixtral", tmp_path / "c", m=112, rope_parameters={"rope_type": "default", "rope_theta": 7e5})
    found = compare_logits(a, other, max_memory=6 << 20)
    assert not found.same
    assert found.first.module == "layers.0"
    assert found.causes == ()
    assert any("no cause was looked for" in note for note in found.notes)


def test_what_is_needed_at_the_least_is_said_and_enough(tmp_path):
    folder = tiny.save("llama", tmp_path / "model")
    with pytest.raises(UsageError, match=r"takes at least [\d.]+ MB of memory") as caught:
        compare_logits(folder, folder, max_memory=1 << 20)
    assert "--max-memory" in str(caught.value.hint)
    tokens, models = torch.zeros(2, 32), [prepared(open_checkpoint(folder), True)] * 2
    least = float(str(caught.value).split("at least ")[1].split(" MB")[0]) * 1e6
    assert room(models, tokens, int(least)) >= 1 << 20
