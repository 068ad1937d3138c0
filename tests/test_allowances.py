"""What may be left out of a model because its logits do not depend on it, and what never."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from surgery.cli.main import main
from surgery.conversion.allow import RULES
from surgery.conversion.convert import convert, prepare
from surgery.conversion.request import Convert
from surgery.errors import ConfigError, UsageError
from tests import oracle, tiny


def edited(folder, change):
    """A saved model with every tensor as `change(name, tensor)` has it."""
    weights = {name: change(name, tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def no_biases(name, tensor):
    return torch.zeros_like(tensor) if name.endswith(".bias") else tensor


def test_biases_of_zeros_can_be_left_out(tmp_path):
    source = edited(tiny.save("qwen2", tmp_path / "qwen2"), no_biases)
    with pytest.raises(ConfigError, match="biases of queries, keys and values: yes") as caught:
        convert(source, tmp_path / "out", to="meta")
    assert caught.value.hint == "the logits do not depend on it: --allow qkv_bias"
    report = convert(source, tmp_path / "out", to="meta", allow=["qkv_bias"])
    assert report.verified
    assert report.source_digest is None  # it has parts that the output has not
    assert report.dropped["layers.{l}.attn.q.bias"] == "zeros only (--allow qkv_bias)"
    assert any("--allow qkv_bias" in note for note in report.notes)
    convert(tmp_path / "out", tmp_path / "back", to="hf")
    ids = torch.arange(40)[None]
    assert oracle.gap(oracle.hf_logits(tmp_path / "back", ids), oracle.hf_logits(source, ids)) < 1e-5


def test_biases_that_count_cannot(tmp_path):
    source = tiny.save("qwen2", tmp_path / "qwen2")
    with pytest.raises(ConfigError, match="biases of queries, keys and values: yes") as caught:
        prepare(source, Convert(to="meta"))
    assert caught.value.hint is None
    with pytest.raises(ConfigError, match=r"--allow qkv_bias: the logits depend on it: .*bias.* are not all zero"):
        prepare(source, Convert(to="meta", allow=["qkv_bias"]))
    edited(source, lambda n, t: no_biases(n, t) if "layers.5.self_attn.v" not in n else t)
    with pytest.raises(ConfigError, match=r"depend on it: .*layers.5.attn.v.bias are"):
        prepare(source, Convert(to="meta", allow=["qkv_bias"]))


@pytest.mark.parametrize(("window", "context", "fits"), [(64, 64, True), (65, 64, True), (63, 64, False)])
def test_windows_that_no_context_reaches(tmp_path, window, context, fits):
    source = tiny.save("mistral", tmp_path / "m", head_dim=10, h=120, sliding_window=window,
                       max_position_embeddings=context)  # fmt: skip
    if fits:
        plan = prepare(source, Convert(to="meta", allow=["windows"]))
        assert plan.source.spec.windows == ()
        ids = torch.randint(0, 264, (1, context), generator=torch.Generator().manual_seed(1))
        convert(source, tmp_path / "out", to="meta", allow=["windows"])
        convert(tmp_path / "out", tmp_path / "back", to="hf")
        assert oracle.gap(oracle.hf_logits(tmp_path / "back", ids), oracle.hf_logits(source, ids)) < 1e-5
    else:
        with pytest.raises(ConfigError, match="a window of 63 is shorter than the context of 64"):
            prepare(source, Convert(to="meta", allow=["windows"]))


def test_only_what_is_in_the_way_is_left_out(tmp_path):
    source = tiny.save("olmo", tmp_path / "olmo", clip_qkv=None)
    with pytest.raises(ConfigError, match="LayerNorm without weights"):
        prepare(source, Convert(to="megatron", allow=list(RULES)))  # nothing is added that is not there
    ones = edited(tiny.save("gpt2", tmp_path / "gpt2"), lambda n, t: torch.ones_like(t) if "ln_" in n and
                  n.endswith("weight") else no_biases(n, t))  # fmt: skip
    plan = prepare(ones, Convert(to="neox", allow=["norm_bias"]))
    assert plan.source.spec.norm == "layer"  # GPT-NeoX can hold it: nothing is left out
    assert "layers.0.attn_norm.bias" in plan.source.parts


def test_what_is_never_left_out(tmp_path):
    source = tiny.save("olmo", tmp_path / "olmo")
    with pytest.raises(ConfigError, match="--allow clip_qkv: the logits depend on it"):
        prepare(source, Convert(to="megatron", allow=["clip_qkv"]))
    with pytest.raises(UsageError, match="--allow dropout: there is no such thing") as caught:
        prepare(source, Convert(to="megatron", allow=["dropout"]))
    assert all(name in caught.value.hint for name in RULES)
    assert prepare(source, Convert(to="olmo", allow=["attention_dropout", "context"])).source.spec.clip_qkv == 2.0


def test_the_command(tmp_path):
    source = edited(tiny.save("qwen2", tmp_path / "qwen2"), no_biases)
    words = ["convert", str(source), str(tmp_path / "out"), "--to", "meta", "--dry-run", "--json"]
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 1
    assert "--allow qkv_bias" in refused.output
    planned = CliRunner().invoke(main, [*words, "--allow", "qkv_bias"])
    assert planned.exit_code == 0, planned.output
    assert "layers.{l}.attn.q.bias" in json.loads(planned.stdout)["dropped"]
    text = CliRunner().invoke(main, ["convert", "--help"]).output
    assert all(name in text for name in RULES)
