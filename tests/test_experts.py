"""Changing experts and collapsing mixtures: against plain loops, and against transformers."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

import surgery
from surgery.cli import main as cli
from surgery.errors import ConfigError
from surgery.formats.registry import open_checkpoint
from surgery.upcycling.collapse import collapsed
from surgery.upcycling.edit_experts.experts import changed_experts
from tests import oracle, tiny
from tests.test_conversion import weights

IDS = torch.randint(0, 264, (2, 24), generator=torch.Generator().manual_seed(12))


def run(*words):
    return CliRunner().invoke(cli.main, [str(w) for w in words])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "glm4_moe", "olmoe", "granitemoeshared"])
@pytest.mark.parametrize("words", [("--permute", "7,6,5,4,3,2,1,0"), ("--duplicate", 2)])
def test_what_keeps_the_function(family, words, tiny_hf, tmp_path):
    done = run("experts", tiny_hf(family), tmp_path / "out", *words, "--verify-tokens", 0)
    assert done.exit_code == 0, done.output
    want = oracle.hf_logits(tiny_hf(family), IDS)
    assert float((oracle.hf_logits(tmp_path / "out", IDS) - want).abs().max()) < 1e-4 * float(want.std())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    count = config.get("num_local_experts", config.get("num_experts", config.get("n_routed_experts")))
    assert (count, config["num_experts_per_tok"]) == ((16, 6) if words[1] == 2 else (8, 3))


@pytest.mark.slow
def test_pruning_and_merging_by_a_loop(tiny_hf, tmp_path):
    source = weights(tiny_hf("mixtral"))
    for flag, text, groups in (("--prune", "0,2-4", [[1], [5], [6], [7]]), ("--keep", "6,1,3", [[6], [1], [3]]),
                               ("--merge", "0+1,2+3+4,7", [[0, 1], [2, 3, 4], [7]])):  # fmt: skip
        out = tmp_path / flag
        refused = run("experts", tiny_hf("mixtral"), out, flag, text)
        assert refused.exit_code == 2
        assert "--force-lossy" in refused.output
        done = run("experts", tiny_hf("mixtral"), out, flag, text, "--force-lossy", "--verify-tokens", 32)
        assert done.exit_code == 0, done.output
        assert "not preserving, as asked" in done.output
        got = weights(out)
        for layer in (0, 5):
            at = f"model.layers.{layer}.block_sparse_moe"
            for new, old in enumerate(groups):
                for w in ("w1", "w2", "w3"):
                    want = sum(source[f"{at}.experts.{e}.{w}.weight"] for e in old) / len(old)
                    torch.testing.assert_close(got[f"{at}.experts.{new}.{w}.weight"], want, rtol=0, atol=1e-7)
                row = sum(source[f"{at}.gate.weight"][e] for e in old) / len(old)
                torch.testing.assert_close(got[f"{at}.gate.weight"][new], row, rtol=0, atol=1e-7)
            assert len(got[f"{at}.gate.weight"]) == len(groups)


BAD = [("--keep", "9"), ("--keep", "a"), ("--permute", "0,1"), ("--keep", "0", "--prune", "1"), ("--top-k", 9), (),
       ("--prune", "0-7")]  # fmt: skip


@pytest.mark.parametrize("words", BAD)
def test_mistakes_are_told(words, tiny_hf, tmp_path):
    done = run("experts", tiny_hf("mixtral"), tmp_path / "x", *words, "--force-lossy")
    assert done.exit_code == 2, done.output
    assert "error:" in done.output


def test_dense_models_have_no_experts(tiny_hf):
    with pytest.raises(ConfigError, match="no experts"):
        changed_experts(open_checkpoint(tiny_hf("llama")), [(0,)])
    with pytest.raises(ConfigError, match="no experts"):
        collapsed(open_checkpoint(tiny_hf("llama")))


MADE = [
    ("llama", {"experts": 4, "top_k": 2, "strategy": "copy"}),
    ("llama", {"experts": 8, "top_k": 4, "granularity": 4}),
    ("llama", {"experts": 8, "top_k": 4, "shared": "0.5", "target": "qwen2_moe"}),
    ("llama", {"experts": 8, "top_k": 4, "shared": "dense"}),
    ("llama_tied", {"experts": 8, "top_k": 4, "scale": "router"}),
    ("qwen3", {"experts": 8, "top_k": 2, "dense_layers": (0,)}),
    ("olmo2", {"experts": 8, "top_k": 2}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "settings"), MADE)
def test_collapsing_is_the_inverse_of_upcycling(family, settings, tiny_hf, tmp_path):
    surgery.upcycle(tiny_hf(family), tmp_path / "moe", verify_tokens=0, **settings)
    done = run("upcycle", tmp_path / "moe", tmp_path / "dense", "--collapse", "--verify-tokens", 16)
    assert done.exit_code == 0, done.output
    assert "proof  exact" in done.output
    before, after = weights(tiny_hf(family)), weights(tmp_path / "dense")
    assert set(after) - set(before) <= {"lm_head.weight"}
    assert all(oracle.same_bits(after[name], before[name]) for name in before)
    model_type = json.loads((tmp_path / "dense" / "config.json").read_text())["model_type"]
    assert model_type == tiny.FAMILIES[family][0]


@pytest.mark.slow
def test_experts_that_differ_are_averaged_when_asked(tiny_hf, tmp_path):
    refused = run("upcycle", tiny_hf("mixtral"), tmp_path / "no", "--collapse")
    assert refused.exit_code == 2
    assert "no copies of each other" in refused.output
    for mode in ("average", "by-router"):
        out = tmp_path / mode
        assert run("upcycle", tiny_hf("mixtral"), out, "--collapse", mode).exit_code == 2
        done = run("upcycle", tiny_hf("mixtral"), out, "--collapse", mode, "--force-lossy", "--verify-tokens", 0)
        assert done.exit_code == 0, done.output
    source, got = weights(tiny_hf("mixtral")), weights(tmp_path / "average")
    want = sum(source[f"model.layers.2.block_sparse_moe.experts.{e}.w3.weight"] for e in range(8)) / 8
    torch.testing.assert_close(got["model.layers.2.mlp.up_proj.weight"], want, rtol=0, atol=1e-7)
    assert not torch.equal(weights(tmp_path / "by-router")["model.layers.2.mlp.up_proj.weight"], want)
    assert torch.isfinite(oracle.hf_logits(tmp_path / "by-router", IDS)).all()
