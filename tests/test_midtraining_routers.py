"""Routers: which families' are understood, what is heard of them, losses and numbers against naive loops."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from surgery.errors import ConfigError, LayoutError, UsageError
from surgery.midtraining.balance import RULES, balance_loss, nudge_biases, router_z_loss, translate
from surgery.midtraining.experts import use_experts
from surgery.midtraining.router_telemetry import RouterTelemetry, alarms, drift, snapshot, summary
from surgery.midtraining.routers import Fp32Routers, Mixture, Routed, RouterLog, find_mixtures
from tests import tiny

IDS = torch.randint(0, 264, (2, 11), generator=torch.Generator().manual_seed(5))
# family -> layers with experts of the six, the path of the router below a layer, scores, the selection bias
FAMILIES = {
    "mixtral": ([0, 1, 2, 3, 4, 5], "mlp.gate", "softmax", ""),
    "olmoe": ([0, 1, 2, 3, 4, 5], "mlp.gate", "softmax", ""),
    "flex_olmo": ([0, 1, 2, 3, 4, 5], "mlp.gate", "softmax", ""),
    "granitemoe": ([0, 1, 2, 3, 4, 5], "block_sparse_moe.router", "softmax", ""),
    "granitemoeshared": ([0, 1, 2, 3, 4, 5], "block_sparse_moe.router", "softmax", ""),
    "qwen3_moe": ([1, 2, 3, 4, 5], "mlp.gate", "softmax", ""),
    "qwen2_moe": ([1, 2, 3, 5], "mlp.gate", "softmax", ""),
    "glm4_moe": ([2, 3, 4, 5], "mlp.gate", "sigmoid", "e_score_correction_bias"),
    "ernie4_5_moe": ([1, 2, 3, 4], "mlp.gate", "softmax", "moe_statics.e_score_correction_bias"),
}
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 64, "num_attention_heads": 4, "intermediate_size": 40,
         "num_key_value_heads": 2, "pad_token_id": None}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- finding


def test_these_are_the_families_with_experts():
    assert set(FAMILIES) == {
        f for f, (_, _, keys) in tiny.FAMILIES.items() if {"num_experts_per_tok", "moe_k"} & set(keys)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_are_found_in_every_family(family):
    model = tiny.model(family)
    layers, path, scores, bias = FAMILIES[family]
    mixtures = find_mixtures(model)
    assert [m.layer for m in mixtures] == layers
    assert {(m.num_experts, m.top_k, m.scores, m.bias_path) for m in mixtures} == {(8, 3, scores, bias)}
    assert [m.router for m in mixtures] == [model.get_submodule(f"model.layers.{l}.{path}") for l in layers]
    with RouterLog(mixtures) as log:
        model(IDS, use_cache=False)
    for mixture, routed in zip(mixtures, log.take(), strict=True):
        assert routed.logits.shape == (22, 8)
        assert routed.experts.shape == (22, 3)
        assert int(routed.counts().sum()) == 22 * 3
        torch.testing.assert_close(routed.probabilities().sum(-1), torch.ones(22))
        if bias:
            assert mixture.bias.numel() == 8
    log.remove()
    assert not any(m.router._forward_hooks for m in mixtures)


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo3"])
def test_dense_models_have_no_mixtures(family):
    assert find_mixtures(tiny.model(family)) == ()


@pytest.mark.parametrize(
    ("family", "keys", "scores"),
    [("deepseek_v3", {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
                      "moe_intermediate_size": 8, "first_k_dense_replace": 0, "n_shared_experts": 1,
                      "q_lora_rank": None, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
                      "v_head_dim": 8}, "sigmoid"),
     ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 6}, "softmax")],
)  # fmt: skip
def test_other_families_and_models_without_weights(family, keys, scores):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **keys}))
    assert [m.scores for m in find_mixtures(model)] == [scores, scores]


@pytest.mark.parametrize(
    ("family", "keys", "why"),
    [("llama4_text", {"num_local_experts": 4, "head_dim": 6, "eos_token_id": 1, "bos_token_id": 2},
      r"not understood: model.layers.0.feed_forward.experts \(Llama4TextExperts\)"),
     ("phimoe", {"num_local_experts": 4}, "PhimoeTopKRouter makes weights of its logits in a way"),
     ("minimax_m2", {"num_local_experts": 4, "head_dim": 6, "eos_token_id": 1, "bos_token_id": 2},
      "MiniMaxM2TopKRouter does not run on tokens alone"),
     ("deepseek_v2", {"n_routed_experts": 8, "first_k_dense_replace": 0}, "has 0 routers and 1 groups of experts")],
)  # fmt: skip
def test_what_is_not_understood_is_refused(family, keys, why):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **keys}))
    with pytest.raises(ConfigError, match=why):
        find_mixtures(model)


class Router(torch.nn.Module):
    """A router that says something wrong of its tokens."""

    def __init__(self, wrong):
        super().__init__()
        self.weight, self.top_k, self.wrong = torch.nn.Parameter(torch.zeros(5, 7)), 2, wrong

    def forward(self, x):
        logits = x @ self.weight.T
        if self.wrong == "order":
            return logits.softmax(-1).topk(2).values, logits, logits.topk(2).indices
        if self.wrong == "scaled":
            logits = 2 * logits
        weights, experts = logits.softmax(-1).topk(2)
        return (
            logits,
            weights + (0.1 if self.wrong == "shifted" else 0),
            experts.int() if self.wrong == "int" else experts,
        )


@pytest.mark.parametrize("wrong", ["", "order", "scaled", "shifted", "int"])
def test_routers_that_break_the_contract(wrong):
    model = tiny.model("olmoe", l=1, h=120)
    model.model.layers[0].mlp.gate = Router(wrong)
    if not wrong:
        assert find_mixtures(model)[0].scores == "softmax"
        return
    with pytest.raises(ConfigError, match=r"model.layers.0.mlp: Router (does not return|makes weights)"):
        find_mixtures(model)


def test_one_expert_of_weight_one_has_any_scores():
    assert find_mixtures(tiny.model("mixtral", l=1, num_experts_per_tok=1))[0].scores == "softmax"
    assert (
        find_mixtures(tiny.model("glm4_moe", l=3, num_experts_per_tok=1, norm_topk_prob=False))[0].scores == "sigmoid"
    )


# ----------------------------------------------------------------------------------------------------------- listening


def gradients(model, mixtures):
    log = RouterLog(mixtures)
    with log:
        model(IDS, use_cache=False)
    routed = log.take()
    log.remove()
    (balance_loss(routed) + router_z_loss(routed)).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


def test_activation_checkpointing_keeps_the_gradient_or_is_refused():
    model = tiny.model("olmoe").train()
    mixtures = find_mixtures(model)
    want = gradients(model, mixtures)
    model.activation_checkpointing_enable({"use_reentrant": False})
    got = gradients(model, mixtures)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[n], want[n]) for n in want)
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(LayoutError, match=r"no gradient would reach the routers of model.layers.0.mlp") as told:
        gradients(model, mixtures)
    assert "use_reentrant=False" in told.value.hint


def test_a_router_that_is_silent_or_speaks_twice():
    model = tiny.model("mixtral", l=2)
    log = RouterLog(find_mixtures(model))
    model(IDS, use_cache=False)  # not entered
    with pytest.raises(LayoutError, match=r"model.layers.0.mlp: 0 times, model.layers.1.mlp: 0 times"):
        log.take()
    with log:
        model(IDS, use_cache=False)
        model(IDS, use_cache=False)
    with pytest.raises(LayoutError, match=r"model\.layers\.0\.mlp: 2 times"):
        log.take()
    with torch.no_grad(), log:
        model(IDS, use_cache=False)
    assert len(log.take()) == 2


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "ernie4_5_moe"])
def test_fp32_routers_under_autocast(family):
    model = tiny.model(family, l=2, **({"moe_layer_end_index": 1} if family == "ernie4_5_moe" else {}))
    mixtures = find_mixtures(model)
    x = torch.randn(9, mixtures[0].weight.shape[1], generator=torch.Generator().manual_seed(1))
    router = mixtures[0].router
    want = router(x)
    handles = Fp32Routers(mixtures)
    with torch.autocast("cpu", torch.bfloat16):
        logits, weights, experts = router(x)
        assert torch.equal(logits, want[0])
        assert torch.equal(weights, want[1])
        assert torch.equal(experts, want[2])
        with pytest.raises(RuntimeError, match="shape"):
            router(x[:, 1:])
        assert torch.is_autocast_enabled("cpu")  # also after an error
    handles.remove()
    handles = Fp32Routers(find_mixtures(model.bfloat16()))
    assert torch.equal(router(x.bfloat16())[0], x.bfloat16().float() @ router.weight.T)
    assert model(IDS, use_cache=False).logits.dtype == torch.bfloat16
    handles.remove()


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "autocast"), [
    ("padded", True), pytest.param("grouped_mm", False, marks=pytest.mark.thorough),
])  # fmt: skip
def test_compiled_models_are_heard_too(backend, autocast):
    model = tiny.model("olmoe", l=1)
    mixtures = find_mixtures(model)
    use_experts(model, mixtures, backend)
    handles, log, got = Fp32Routers(mixtures), RouterLog(mixtures), []
    for run in (model, torch.compile(model, backend="aot_eager")):
        with log, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = run(IDS, labels=IDS, use_cache=False).loss
        (loss + balance_loss(log.take())).backward()
        got.append({n: p.grad.clone() for n, p in model.named_parameters()})
        model.zero_grad(set_to_none=True)
    handles.remove()
    assert all(torch.equal(got[0][n], got[1][n]) for n in got[0])


# -------------------------------------------------------------------------------------------------------------- losses


def said(tokens=40, experts=6, top_k=2, layers=3, scores="softmax", seed=0):
    """Routers that said random things."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(layers):
        logits = (2 * torch.randn(tokens, experts, generator=generator)).requires_grad_()
        out.append(Routed(logits, logits.topk(top_k).indices, scores))
    return out


def naive(routed, scores):
    """Balance and router z of each layer, token by token, in double precision."""
    pairs = []
    for r in routed:
        tokens, experts = r.logits.shape
        share, chance, z = [0.0] * experts, [0.0] * experts, 0.0
        for t in range(tokens):
            row = [math.exp(v) for v in r.logits[t].tolist()]
            if scores == "sigmoid":
                row = [v / (1 + v) for v in row]
            z += math.log(sum(math.exp(v) for v in r.logits[t].tolist())) ** 2 / tokens
            for e in range(experts):
                chance[e] += row[e] / sum(row) / tokens
            for e in r.experts[t].tolist():
                share[e] += 1 / r.experts.numel()
        pairs.append((experts * sum(f * p for f, p in zip(share, chance, strict=True)), z))
    return pairs


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_losses_against_a_naive_loop(scores):
    routed = [Routed(r.logits.detach(), r.experts, scores) for r in said(scores=scores)]
    want = naive(routed, scores)
    mean = [sum(x) / len(x) for x in zip(*want, strict=True)]
    assert float(balance_loss(routed)) == pytest.approx(mean[0], rel=1e-6)
    assert float(router_z_loss(routed)) == pytest.approx(mean[1], rel=1e-6)
    assert float(balance_loss(routed, micro_batches=4)) == pytest.approx(mean[0] / 4, rel=1e-6)
    rule = RULES["megatron"]
    assert float(balance_loss(routed, rule, micro_batches=4)) == pytest.approx(mean[0] * 3 / 4, rel=1e-6)
    assert float(router_z_loss(routed, rule)) == pytest.approx(mean[1] * 3, rel=1e-6)
    rule = RULES["olmo_core"]
    assert float(balance_loss(routed, rule, labels=36, micro_batches=4)) == pytest.approx(mean[0] * 40 / 36, rel=1e-6)
    assert float(router_z_loss(routed, rule, labels=36)) == pytest.approx(mean[1] * 40 / 36, rel=1e-6)
    with pytest.raises(UsageError, match="labels of the step"):
        balance_loss(routed, rule)
    for scale in (1.0, 0.5):  # of a bf16 model's routers too, in fp32
        low = [Routed((scale * r.logits).bfloat16(), r.experts, scores) for r in routed]
        assert balance_loss(low).dtype == router_z_loss(low).dtype == torch.float32


def test_transformers_own_loss():
    routed = said(top_k=3)
    want = load_balancing_loss_func(tuple(r.logits for r in routed), 6, 3)
    got = balance_loss(routed, RULES["transformers"], micro_batches=4)  # Trainer adds up its micro-batches
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    leaves = [r.logits for r in routed]
    for mine, theirs in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)


def collapsed(experts=8, layers=4):
    """Every layer uses two experts only, each layer another two."""
    out = []
    for layer in range(layers):
        logits = torch.full((64, experts), -20.0)
        logits[:, [2 * layer, 2 * layer + 1]] = 20.0
        out.append(Routed(logits, logits.topk(2).indices, "softmax"))
    return out


def test_a_layer_that_collapsed_is_seen():
    assert float(balance_loss(collapsed())) == pytest.approx(4.0)
    assert float(balance_loss(collapsed(), RULES["transformers"])) == pytest.approx(2.0)  # its value of even load
    even = [Routed(torch.zeros(4, 8), torch.arange(8).view(4, 2), "softmax")]
    assert float(balance_loss(even)) == pytest.approx(1.0)


def test_ranks_together_are_one_process():
    """Two ranks with half of the tokens each: the sum of their losses and gradients is that of the whole."""
    whole = said()
    want = balance_loss(whole)
    grads = torch.autograd.grad(want, [r.logits for r in whole])
    halves = [[Routed(r.logits[s], r.experts[s], r.scores) for r in whole] for s in (slice(0, 20), slice(20, 40))]
    counts = [torch.stack([r.counts() for r in half]) for half in halves]
    got = sum(balance_loss(half, ranks=2, reduce=lambda mine: sum(counts)) for half in halves)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    for mine, theirs in zip(torch.autograd.grad(got, [r.logits for r in whole]), grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-9)
    alone = sum(balance_loss(half, ranks=2) for half in halves)
    assert abs(float((alone - want).detach())) > 1e-3  # without `reduce` it depends on the number of ranks
    for rule in RULES.values():
        share = {"micro_batches": 3, "labels": 36}
        want = router_z_loss(whole, rule, **share)
        got = sum(router_z_loss(half, rule, ranks=2, **share) for half in halves)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_coefficients_of_other_trainers():
    """The translated coefficient gives the same loss and gradient, where layers are alike."""
    one = said(layers=1)
    routed, micro = one * 5, 3
    for trainer, rule in RULES.items():
        theirs = {"micro_batches": micro, "labels": 40 * micro}
        for loss, is_z in ((balance_loss, False), (router_z_loss, True)):
            ours, note = translate(0.01, trainer, top_k=2, layers=5, micro_batches=micro, z_loss=is_z)
            want = sum(0.01 * loss(routed, rule, **theirs) for _ in range(micro))
            got = sum(ours * loss(routed, micro_batches=micro) for _ in range(micro))
            torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
            assert note.startswith(f"0.01 of {trainer} is {ours:g} here")
    assert translate(0.01, "transformers", top_k=8, layers=16)[1].startswith(
        "0.01 of transformers is 0.08 here: times top_k (8); one value over all layers there"
    )
    assert translate(0.01, "megatron", top_k=8, layers=16)[0] == pytest.approx(0.16)
    with pytest.raises(UsageError, match="'nemo'"):
        translate(0.01, "nemo", top_k=8, layers=16)


def test_selection_biases_even_out_the_load():
    model = tiny.model("glm4_moe", l=4)
    mixtures = find_mixtures(model)
    ids = torch.randint(0, 264, (8, 32), generator=torch.Generator().manual_seed(1))
    log, before, loads = RouterLog(mixtures), [m.weight.clone() for m in mixtures], []
    for mixture in mixtures:
        mixture.bias[5] += 0.4
    for _ in range(30):
        with torch.no_grad(), log:
            model(ids, use_cache=False)
        counts = torch.stack([r.counts() for r in log.take()])
        loads.append(float(counts.max() * 8 / (256 * 3)))
        old = [m.bias.clone() for m in mixtures]
        nudge_biases(mixtures, counts, rate=0.02)
        for mixture, bias, chosen in zip(mixtures, old, counts, strict=True):
            moved = torch.tensor([0.02 if n < 96 else -0.02 if n > 96 else 0.0 for n in chosen.tolist()])
            torch.testing.assert_close(mixture.bias - bias, moved, rtol=0, atol=1e-6)
    assert loads[0] > 1.5
    assert loads[-1] < 1.15
    assert all(torch.equal(m.weight, w) for m, w in zip(mixtures, before, strict=True))
    ernie = find_mixtures(tiny.model("ernie4_5_moe"))
    held = ernie[0].router.moe_statics.e_score_correction_bias.requires_grad_()  # as a parameter is
    old = held.detach().clone()
    nudge_biases(ernie, torch.arange(8).expand(4, 8))
    torch.testing.assert_close((held - old)[0], torch.tensor([1e-3] * 4 + [-1e-3] * 4), rtol=0, atol=1e-6)
    with pytest.raises(UsageError, match="no bias that chooses experts"):
        nudge_biases(find_mixtures(tiny.model("mixtral", l=1)), torch.ones(1, 8))


# ----------------------------------------------------------------------------------------------------------- telemetry


@pytest.mark.parametrize("autocast", [False, True])
def test_readings_against_naive_counts(autocast):
    micros = [said(tokens=700, seed=s) for s in (1, 2)]
    source = torch.arange(700) % 3
    telemetry = RouterTelemetry([1, 4, 5], sources=["web", "code", "law"])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for routed in micros:
            telemetry.add(routed, source)
    counts = telemetry.counts()
    reading = telemetry.read()
    assert telemetry.read() == {}
    assert reading["layers"] == [1, 4, 5]
    assert (reading["tokens"], reading["dropped"]) == (1400, 0)
    for layer in range(3):
        chosen = [row for routed in micros for row in routed[layer].experts.tolist()]
        count = [sum(e in row for row in chosen) for e in range(6)]
        assert counts[layer].tolist() == count
        load = [n / 2800 for n in count]
        assert reading["load"][layer] == pytest.approx(load)
        assert reading["max_load"][layer] == pytest.approx(6 * max(load))
        assert reading["load_cv"][layer] == pytest.approx((sum((6 * x - 1) ** 2 for x in load) / 6) ** 0.5)
        assert reading["load_entropy"][layer] == pytest.approx(-sum(x * math.log(x) for x in load) / math.log(6))
        assert reading["dead"][layer] == 0
        together = [[sum(i in row and j in row for row in chosen) / count[i] for j in range(6)] for i in range(6)]
        assert torch.allclose(torch.tensor(reading["together"][layer]), torch.tensor(together))
        logits = torch.cat([routed[layer].logits for routed in micros]).double()
        assert reading["logit_rms"][layer] == pytest.approx(float(logits.square().mean().sqrt().detach()))
        p = logits.softmax(-1)
        entropy = float((-(p * p.log()).sum(-1).mean() / math.log(6)).detach())
        assert reading["gate_entropy"][layer] == pytest.approx(entropy, rel=1e-5)
        for number, name in enumerate(("web", "code", "law")):
            mine = [row for t, row in enumerate(chosen) if t % 700 % 3 == number]
            share = [sum(e in row for row in mine) / (2 * len(mine)) for e in range(6)]
            assert reading["by_source"][name][layer] == pytest.approx(share)
    line = summary(reading)
    assert line["max_load"] == pytest.approx(max(reading["max_load"]), abs=1e-6)
    assert line["load_entropy"] == pytest.approx(min(reading["load_entropy"]), abs=1e-6)
    assert set(line) == {"max_load", "load_cv", "load_entropy", "dead", "gate_entropy", "logit_rms"}
    assert alarms(reading) == []


def test_ranks_are_summed():
    halves, whole = [RouterTelemetry([0, 1, 2]) for _ in range(2)], RouterTelemetry([0, 1, 2])
    for seed, telemetry in enumerate(halves):
        telemetry.add(said(seed=seed))
        whole.add(said(seed=seed))
    other = iter([dict(halves[1]._sums)[n] for n in halves[0]._sums])
    assert halves[0].read(lambda mine: mine + next(other)) == whole.read()


def test_alarms_name_the_layer():
    telemetry = RouterTelemetry([3, 7, 8, 9])
    telemetry.add(collapsed())
    reading = telemetry.read()
    assert reading["max_load"] == pytest.approx([4.0] * 4)
    assert alarms(reading)[:2] == [
        "layer 3: the busiest expert has 4.0 times the mean load (more than 3.2)",
        "layer 3: 75% of 8 experts had no token (more than 10%)",
    ]
    assert len(alarms(reading)) == 8
    assert alarms({}) == []


def test_a_choice_that_is_lost_is_an_error():
    telemetry = RouterTelemetry([0])
    (one,) = said(layers=1)
    telemetry.add([Routed(one.logits, torch.zeros_like(one.experts), "softmax")])  # the same expert twice
    with pytest.raises(AssertionError, match="40 choices of experts are lost"):
        telemetry.read()


def test_drift():
    model = tiny.model("olmoe", l=2)
    mixtures = find_mixtures(model)
    log = RouterLog(mixtures)

    def routed():
        with torch.no_grad(), log:
            model(IDS, use_cache=False)
        return log.take()

    start = snapshot(mixtures, routed())
    assert drift(start, mixtures, routed()) == {"weight_drift": [0.0, 0.0], "agreement": [1.0, 1.0]}
    with torch.no_grad():
        mixtures[1].weight.mul_(1.5)  # the same order of experts
        moved = drift(start, mixtures, routed())
        assert moved == {"weight_drift": [0.0, pytest.approx(0.5)], "agreement": [1.0, 1.0]}
        mixtures[1].weight.mul_(-1)  # the opposite order: of eight the last three, not the first three
        moved = drift(start, mixtures, routed())
    assert moved == {"weight_drift": [0.0, pytest.approx(2.5)], "agreement": [1.0, 0.0]}
    assert summary(moved) == {"weight_drift": 2.5, "agreement": 0.0}


def test_mixtures_are_frozen_facts():
    mixture = find_mixtures(tiny.model("mixtral", l=1))[0]
    assert isinstance(mixture, Mixture)
    assert mixture.weight is mixture.router.weight
    assert mixture.bias is None
