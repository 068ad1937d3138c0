"""Who decays, who is frozen, which steps are left out, and fp32 masters of bf16 weights."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from surgery.errors import ConfigError, SurgeryError
from surgery.midtraining.optimizer import DECAYS, KINDS, adamw, freeze, grouped, kinds_of, named, set_rate
from surgery.midtraining.precision import Masters, bf16_gain, choose
from surgery.midtraining.skip_step import Spikes
from tests import tiny


@pytest.mark.parametrize(
    "family", ["llama", "llama_tied", "qwen2", "olmo2", "olmoe", "mixtral", "glm4_moe", "gpt_neox"]
)
def test_kinds_of_parameters(family):
    model = tiny.model(family)
    kinds = kinds_of(model)
    assert list(kinds) == [n for n, _ in model.named_parameters()]
    assert set(kinds.values()) <= set(KINDS) - {"vector"}
    assert [k for k, v in kinds.items() if v == "norm"] == [k for k in kinds if "norm" in k and k.endswith("weight")]
    assert [k for k, v in kinds.items() if v == "embedding"] == [k for k in kinds if "embed" in k and "out" not in k]
    assert sum(v == "head" for v in kinds.values()) == (not model.config.tie_word_embeddings)
    routers = [k for k, v in kinds.items() if v == "router"]
    assert len(routers) == {"olmoe": 6, "mixtral": 6, "glm4_moe": 4}.get(family, 0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "olmo2", "olmoe", "gpt_neox"])
def test_the_preset_hf_decays_what_the_trainer_decays(family, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = tiny.model(family)
    trainer = Trainer(model, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    groups = grouped(model, DECAYS["hf"], weight_decay=0.1)
    decaying = {n for g in groups if g["weight_decay"] for n in g["names"]}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert decaying == set(trainer.get_decay_parameter_names(model)) - tied


def test_presets_and_exceptions():
    model = tiny.model("olmoe")
    kinds = kinds_of(model)

    def decaying(preset: str, **more: object) -> set[str]:
        groups = grouped(model, DECAYS[preset], 0.1, **more)
        return {n for g in groups if g["weight_decay"] == 0.1 for n in g["names"]}

    assert {kinds[n] for n in decaying("olmo")} == {"matrix", "head", "router", "norm"}
    assert {kinds[n] for n in decaying("llama")} == {"matrix", "head"}
    assert {kinds[n] for n in decaying("megatron")} == {"matrix", "head", "router", "embedding"}
    assert decaying("all") == set(kinds)
    first = "model.layers.0.self_attn.q_proj.weight"
    assert decaying("all") - decaying("all", no_decay=["norm", first]) == {
        n for n, k in kinds.items() if k == "norm" or n == first
    }
    with pytest.raises(ConfigError, match="'rooter' is no kind"):
        grouped(model, DECAYS["llama"], 0.1, no_decay=["rooter"])


def test_rates_are_scaled_by_kind_and_frozen_parameters_stay():
    model = tiny.model("olmoe", l=1)
    frozen = freeze(model, ["embedding", "model.layers.*.self_attn.*"])
    groups = grouped(model, DECAYS["llama"], 0.1, lr_scale={"router": 0.25})
    optimizer = adamw(groups, (0.9, 0.95), 1e-8)
    assert set(dict(named(optimizer))) == set(kinds_of(model)) - set(frozen)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(input_ids=torch.arange(60)[None], labels=torch.arange(60)[None]).loss.backward()
    set_rate(optimizer, 1e-3)
    optimizer.step()
    moved = {n: float((p.detach() - before[n]).abs().max()) for n, p in model.named_parameters()}
    assert {n for n, d in moved.items() if not d} == set(frozen)
    assert moved["model.layers.0.mlp.gate.weight"] == pytest.approx(2.5e-4, rel=1e-2)  # Adam's first step is the rate
    assert moved["model.norm.weight"] == pytest.approx(1e-3, rel=1e-2)
    with pytest.raises(ConfigError, match="nothing would be trained"):
        freeze(model, ["*"])


def test_steps_far_from_the_last_ones_are_left_out():
    spikes = Spikes(sigma=3, window=16, abort_after=4)
    values = [2 + 0.1 * math.sin(i) for i in range(16)]
    assert [spikes.judge(v, 1.0 + 0.01 * v) for v in values[:8]] == [None] * 8
    limit = statistics.fmean(values[:8]) + 3 * statistics.stdev(values[:8])
    assert spikes.judge(9.0, 1.0) == f"the loss 9 is above {limit:.4g}"
    assert spikes.judge(2.0, 5.0).startswith("the gradient norm 5 is above")
    assert spikes.judge(math.nan, 1.0) == "the loss is nan"
    assert (spikes.skipped, spikes.in_a_row) == (3, 3)
    assert list(spikes.recent["loss"])[-2:] == [9.0, 2.0]  # what is not finite is not remembered
    kept = spikes.state_dict()
    with pytest.raises(SurgeryError, match="4 steps in a row were left out; the last one as the loss is inf"):
        spikes.judge(math.inf, 1.0)
    again = Spikes(sigma=3, window=16, abort_after=4)
    again.load_state_dict(kept)
    assert again.state_dict() == kept
    assert again.judge(2.0, 1.0) is None and again.in_a_row == 0


def test_few_values_say_nothing_of_spikes():
    spikes = Spikes(sigma=3, window=16)
    assert [spikes.judge(v, 1.0) for v in (2.0, 2.01, 2.0, 2.01, 2.0, 2.01, 2.0)] == [None] * 7
    assert spikes.judge(50.0, 1.0) is None  # the eighth is judged by seven
    assert Spikes(sigma=None).judge(1e30, 1.0) is None


def test_masters_gather_in_fp32_what_bf16_would_lose():
    held = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    plain = torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [held, plain]}]
    masters = Masters(groups)
    master, same = groups[0]["params"]
    assert same is plain and master.dtype == torch.float32
    for gradient in (1.0, 1 / 512, 1 / 512):  # in bf16, 1 + 1/512 is 1
        (held * torch.tensor(gradient, dtype=torch.bfloat16)).sum().backward()
    assert held.grad is None
    assert master.grad.tolist() == [1 + 1 / 256] * 3
    with torch.no_grad():
        master -= 1e-3 * master.grad
    masters.copy_back()
    assert held.tolist() == master.detach().bfloat16().tolist()


def test_precision_is_chosen_by_what_is_measured(monkeypatch):
    from surgery.midtraining import precision

    assert 0.01 < bf16_gain() < 100
    monkeypatch.setattr(precision, "bf16_gain", lambda: 2.0)
    assert choose("auto", "cpu").name == "autocast"
    monkeypatch.setattr(precision, "bf16_gain", lambda: 1.1)
    assert choose("auto", "cpu").name == "fp32"
    assert choose("bf16", "cpu").weights == torch.bfloat16
    with choose("autocast", "cpu").computing("cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
