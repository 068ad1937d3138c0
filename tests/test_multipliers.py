"""Granite's factors on the embedding, on what layers add, on scores and on logits: read, kept, computed, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import surgery
from surgery.conversion.inspection import describe
from surgery.errors import ConfigError
from surgery.formats.hf.config import read_config, write_config
from surgery.formats.registry import FORMATS, open_checkpoint
from surgery.midtraining.batching import MicroBatch
from surgery.midtraining.loss import chunked_loss
from surgery.midtraining.model import load
from surgery.midtraining.preference import completion_logps
from surgery.midtraining.step import hidden_states
from surgery.running.activations import each_layer
from tests import oracle, reference, tiny

IDS = torch.arange(2 * 20).reshape(2, 20) * 7 % 260
SMALL = {"l": 2}
KEYS = {"embedding_multiplier": 5.5, "residual_multiplier": 0.4, "attention_multiplier": 0.1, "logits_scaling": 3.0}
GRANITES = ("granite", "granitemoe", "granitemoeshared")


@pytest.fixture(scope="module")
def granite(tmp_path_factory) -> Path:
    return tiny.save("granite", tmp_path_factory.mktemp("granite") / "model", **SMALL)


@pytest.mark.parametrize("family", GRANITES)
def test_every_factor_is_read_as_transformers_computes_it(family, tmp_path):
    plain = dict.fromkeys(KEYS, 1.0)
    whole = tiny.save(family, tmp_path / "all", **SMALL, **KEYS)
    assert oracle.gap(reference.logits(open_checkpoint(whole), IDS), oracle.hf_logits(whole, IDS)) < 2e-4
    for key, value in KEYS.items():
        folder = tiny.save(family, tmp_path / key, **SMALL, **{**plain, key: value})
        assert oracle.gap(reference.logits(open_checkpoint(folder), IDS), oracle.hf_logits(folder, IDS)) < 2e-4


def test_a_config_comes_back_as_it_was():
    stated = tiny.config("granite").to_dict()
    again = write_config(read_config(stated, "config.json")[0], {}, "float32", "granite")
    assert {key: again[key] for key in KEYS} == {key: stated[key] for key in KEYS}
    usual = read_config(tiny.config("granite", attention_multiplier=0.31622777).to_dict(), "config.json")[0]
    assert usual.score_scale is None  # 1 / sqrt(10), in single precision
    near = read_config(tiny.config("granite", attention_multiplier=0.316228).to_dict(), "config.json")[0]
    assert near.score_scale == 0.316228
    absent = {k: v for k, v in stated.items() if k not in KEYS}
    spec, _, notes = read_config(absent, "config.json")
    assert (spec.embed_scale, spec.residual_scale, spec.score_scale, spec.logits_divisor) == (1.0, 1.0, 1.0, 1.0)
    assert "attention_multiplier = 1.0" in notes[0]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", [0, -1.0, "12", True, 1e300])
def test_factors_that_make_no_sense_are_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        read_config({**tiny.config("granite").to_dict(), key: value}, "config.json")


def test_a_granite_is_copied_merged_and_compared(granite, tmp_path):
    report = surgery.convert(granite, tmp_path / "copy", to="hf", dtype="fp16")
    assert report.verified
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["embedding_multiplier"] == 12.0
    assert "scale of the embedding" in describe(open_checkpoint(granite))["choices"]
    shutil.copytree(granite, tmp_path / "twin")
    both = [{"model": str(model), "parameters": {"weight": 0.5}} for model in (granite, tmp_path / "twin")]
    surgery.soup({"merge_method": "linear", "models": both}, tmp_path / "soup")
    assert oracle.gap(oracle.hf_logits(tmp_path / "soup", IDS), oracle.hf_logits(granite, IDS)) < 1e-4
    assert surgery.verify(granite, tmp_path / "soup").same
    other = tiny.save("granite", tmp_path / "other", **SMALL, logits_scaling=8.0)
    found = surgery.verify(granite, other)
    assert not found.same and "divisor of the logits" in found.verdict


@pytest.mark.parametrize("to", [name for name in FORMATS if name != "hf"])
@pytest.mark.parametrize("key", KEYS)
def test_no_other_format_holds_any_of_them(to, key, tmp_path):
    labels = {"embedding_multiplier": "scale of the embedding: 5.5", "residual_multiplier": "what layers add: 0.4",
              "attention_multiplier": "attention scores: 0.1", "logits_scaling": "of the logits: 3"}  # fmt: skip
    plain = {**dict.fromkeys(KEYS, 1.0), "attention_multiplier": 10**-0.5}
    folder = tiny.save("granite", tmp_path / "model", l=1, **{**plain, key: KEYS[key]})
    with pytest.raises(ConfigError, match=labels[key]):
        surgery.convert(folder, tmp_path / "out", to=to)
    with pytest.raises(ConfigError, match=labels[key]):
        surgery.convert(folder, tmp_path / "out", to="hf", options={"family": "llama"})


def test_a_granite_is_upcycled_into_a_granite_and_back(granite, tmp_path):
    surgery.upcycle(granite, tmp_path / "moe", experts=4, top_k=2, strategy="copy")
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["model_type"] == "granitemoeshared"
    assert oracle.gap(oracle.hf_logits(tmp_path / "moe", IDS), oracle.hf_logits(granite, IDS)) < 1e-4
    with pytest.raises(ConfigError, match=r"a mixtral cannot hold this model: .*scale of the embedding"):
        surgery.upcycle(granite, tmp_path / "no", experts=4, top_k=2, strategy="copy", target="mixtral")


def test_training_divides_the_logits_as_the_model_does(granite):
    model, _ = load(open_checkpoint(granite), torch.float32, "cpu")
    labels = IDS.roll(-1, 1)
    part = MicroBatch(IDS, labels, None, torch.zeros(2, dtype=torch.long), labels.numel())
    parameters = dict(model.named_parameters())
    wanted = model(input_ids=IDS, use_cache=False).logits.double()
    nats = torch.nn.functional.cross_entropy(wanted.flatten(0, 1), labels.flatten(), reduction="none").view(2, -1)
    theirs = torch.autograd.grad(nats.mean(), list(parameters.values()))
    hidden, head = hidden_states(model, part), model.get_output_embeddings().weight
    loss = chunked_loss(hidden, head, labels, labels.numel(), chunk=7)[0]
    for ours, want in zip(torch.autograd.grad(loss, list(parameters.values())), theirs, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-3, atol=1e-6)
    logps, _ = completion_logps(hidden_states(model, part), head, labels)
    torch.testing.assert_close(logps.double(), -nats.sum(1), rtol=1e-5, atol=1e-5)


def test_gradients_of_activations_are_those_of_the_divided_logits(granite):
    model, _ = load(open_checkpoint(granite), torch.float32, "cpu")
    seen: dict[int, torch.Tensor] = {}
    handle = model.base_model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda _, args: seen.setdefault(-1, args[0]).retain_grad()
    )
    logits = model(input_ids=IDS, use_cache=False).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()).backward()
    handle.remove()
    each_layer(open_checkpoint(granite), IDS, lambda i, x, h, g: seen.__setitem__(i, g), gradients=True)
    torch.testing.assert_close(seen[0], seen[-1].grad.flatten(0, -2), rtol=1e-3, atol=1e-7)
