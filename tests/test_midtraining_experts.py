"""Ways to run experts: against golden layers, against transformers' own loop, and in what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralSparseMoeBlock
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from surgery.errors import UsageError
from surgery.midtraining import experts, experts_padded
from surgery.midtraining.balance import balance_loss, router_z_loss
from surgery.midtraining.experts_layout import ordered
from surgery.midtraining.experts_padded import ROWS, blocked
from surgery.midtraining.routers import RouterLog, find_mixtures
from tests import tiny

GOLDEN = Path(__file__).parent / "golden" / "moe_layer"
FP32 = 5e-6  # of the norm of the difference to the norm, per tensor
HERE = ["loop", "grouped_mm", "padded"]  # what needs neither a GPU nor another package
FAMILIES = [f for f, (_, _, keys) in tiny.FAMILIES.items() if {"num_experts_per_tok", "moe_k"} & set(keys)]
IDS = torch.randint(0, 264, (2, 9), generator=torch.Generator().manual_seed(5))


# -------------------------------------------------------------------------------------------------------- golden layers


def block(case, z):
    """The layer of transformers that a golden case describes, with its weights; and of what is shared."""
    sizes = {"hidden_size": case["D"], "num_experts_per_tok": case["k"], "hidden_act": "silu"}
    if case["layout"] == "deepseek_v3":
        groups, kept = case["groups"]
        config = AutoConfig.for_model(
            "glm4_moe", **sizes, moe_intermediate_size=case["H"], n_routed_experts=case["E"], n_shared_experts=1,
            n_group=groups, topk_group=kept, norm_topk_prob=True, routed_scaling_factor=case["scale"])  # fmt: skip
        built = Glm4MoeMoE(config)
    elif case["layout"] == "mixtral":
        config = AutoConfig.for_model("mixtral", **sizes, intermediate_size=case["H"], num_local_experts=case["E"])
        built = MixtralSparseMoeBlock(config)
    else:
        config = AutoConfig.for_model("olmoe", **sizes, intermediate_size=case["H"], num_experts=case["E"],
                                      norm_topk_prob=case["renorm"])  # fmt: skip
        built = OlmoeSparseMoeBlock(config)
    built = built.double().requires_grad_()
    with torch.no_grad():
        built.gate.weight.copy_(z["weight.router"])
        built.experts.gate_up_proj.copy_(torch.cat([z["weight.w_gate"], z["weight.w_up"]], 1))
        built.experts.down_proj.copy_(z["weight.w_down"])
        if "bias" in z:
            built.gate.e_score_correction_bias.copy_(z["bias"])
        if case["layout"] == "deepseek_v3":
            for name in ("gate", "up", "down"):
                getattr(built.shared_experts, f"{name}_proj").weight.copy_(z[f"weight.s_{name}"])
    return built.float()


def of_olmo_core(routed, x, z, k):
    """OLMo-core's rule for a shared expert (olmo_core/nn/moe/moe.py): it counts as one of k + 1."""
    gate, up, down = (z[f"weight.s_{n}"].float() for n in ("gate", "up", "down"))
    return (F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down) + k * routed) / (k + 1)


CASES = json.loads((GOLDEN / "about.json").read_text())["cases"]


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("case", CASES)
def test_golden_layers(case, name):
    about = CASES[case]
    z = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"{case}.npz").items()}
    built = block(about, z)
    (mixture,) = find_mixtures(built)
    assert mixture.scores == about["gate"]
    built.experts.config._experts_implementation_internal = "surgery_" + name
    experts.use_experts(SimpleNamespace(set_experts_implementation=lambda _: None), [mixture], name)
    x = z["x"].float().requires_grad_()
    with RouterLog([mixture]) as log:
        y = built(x[None])[0]
    routed = log.take()
    if about.get("shared") == "olmo_core":
        y = of_olmo_core(y, x, z, about["k"])
    assert torch.equal(routed[0].experts.sort(-1).values, z["experts"].long().sort(-1).values)
    assert torch.equal(routed[0].counts(), (z["load"] * about["T"] * about["k"]).round().long())
    aux, router_z = balance_loss(routed), router_z_loss(routed)
    for got, want in ((y, z["y"]), (aux, z["aux"]), (router_z, z["router_z"])):
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-5)
    leaves = {
        "x": x,
        "router": built.gate.weight,
        "gate_up": built.experts.gate_up_proj,
        "w_down": mixture.experts.down_proj,
    }
    for tag, loss in (("out", (y * z["grad_y"].float()).sum()), ("aux", aux), ("z", router_z)):
        grads = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
        got = dict(zip(leaves, grads, strict=True))
        if tag == "out":
            got["w_gate"], got["w_up"] = got.pop("gate_up").chunk(2, 1)
        else:
            assert got.pop("gate_up") is None
            assert got.pop("w_down") is None
        for leaf, grad in got.items():
            torch.testing.assert_close(grad.double(), z[f"grad_{tag}.{leaf}"], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- families


def step(model):
    """Loss and gradients of a model on the same ids."""
    loss = model(IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), grads


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_transformers_loop(family):
    model = tiny.model(family, l=3, **({"moe_layer_end_index": 2} if family == "ernie4_5_moe" else {}))
    mixtures = find_mixtures(model)
    model.set_experts_implementation("eager")
    want_loss, want = step(model)
    for name in HERE:
        experts.use_experts(model, mixtures, name)
        assert "surgery" not in model.config.to_json_string()
        loss, got = step(model)
        torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
        assert got.keys() == want.keys()
        assert {n: distance(got[n], want[n]) for n in want if distance(got[n], want[n]) > FP32} == {}


@pytest.mark.parametrize("at_once", [0, 1 << 20])
@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_in_every_family(family, at_once, monkeypatch):
    """On one layer, since tokens that are routed elsewhere after rounding would hide everything in a whole model."""
    module = find_mixtures(tiny.model(family, l=3))[0].experts
    module.config._experts_implementation = "eager"
    monkeypatch.setattr(experts_padded, "AT_ONCE", at_once)
    inputs = problem(width=module.down_proj.shape[1], count=8)
    want = results(transformers_loop, module, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = results(transformers_loop, module, *inputs)
        for name in HERE:
            got = results(experts.EXPERTS[name].run, module, *inputs)
            for mine, other, exact in zip(got, theirs, want, strict=True):
                assert mine.dtype == torch.float32
                assert 1e-4 < distance(mine, exact) < 1.5 * distance(other, exact), name


def distance(got, want):
    return float(((got.float() - want.float()).norm() / want.float().norm().clamp(min=1e-12)).detach())


# ---------------------------------------------------------------------------------------------- experts of other shapes

E, K, H, WIDTH, T = 6, 3, 24, 40, 37


def module_of(kind, **keys):
    sizes = {"hidden_size": H, "num_local_experts": E, "num_experts_per_tok": K}
    classes = {
        "mixtral": (MixtralExperts, {"intermediate_size": WIDTH, "hidden_act": "silu"}),
        "gpt_oss": (GptOssExperts, {"intermediate_size": WIDTH}),
        "nemotron_h": (NemotronHExperts, {"moe_intermediate_size": WIDTH, "n_routed_experts": E}),
        "muse_spark": (
            MuseSparkExperts,
            {"moe_intermediate_size": WIDTH, "moe_hidden_size": H, "post_norm_eps": 1e-6, "hidden_act": "silu"},
        ),
    }
    cls, own = classes[kind]
    built = cls(SimpleNamespace(**{**vars_of(kind), **sizes, **own, **keys}, _experts_implementation="eager"))
    generator = torch.Generator().manual_seed(1)
    for p in built.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=generator)
    return built


def vars_of(kind):
    return {k: v for k, v in AutoConfig.for_model(kind).to_dict().items() if not k.startswith("_")}


def problem(tokens=T, width=H, count=E, chosen=None):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, width, generator=generator).requires_grad_()
    spread = torch.rand(tokens, count, generator=generator).topk(K, -1).indices
    weights = torch.rand(tokens, K, generator=generator).requires_grad_()
    return x, spread if chosen is None else chosen, weights


def results(run, module, x, chosen, weights):
    y = run(module, x, chosen, weights)
    loss = (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
    return [y, *torch.autograd.grad(loss, [x, weights, *module.parameters()])]


def transformers_loop(module, x, chosen, weights):
    return module(x, chosen, weights)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize(
    ("kind", "keys"),
    [("mixtral", {}), ("mixtral", {"hidden_act": "gelu"}), ("mixtral", {"hidden_act": "linear"}), ("gpt_oss", {}),
     ("nemotron_h", {}), ("muse_spark", {})],
)  # fmt: skip
def test_biases_acts_norms_and_layouts(kind, keys, name):
    module = module_of(kind, **keys)
    if why := experts.EXPERTS[name].refuses(module):
        assert (kind, name) == ("muse_spark", "padded")
        assert "norm" in why
        return
    want = results(transformers_loop, module, *problem())
    got = results(experts.EXPERTS[name].run, module, *problem())
    assert max(distance(a, b) for a, b in zip(got, want, strict=True)) < FP32


@pytest.mark.parametrize("name", HERE)
def test_bf16_is_as_near_to_fp32_as_the_loop(name):
    module = module_of("mixtral")
    want = results(experts.EXPERTS["loop"].run, module, *problem())
    low = module.bfloat16()
    problems = [p.detach().bfloat16().requires_grad_() if p.is_floating_point() else p for p in problem()]
    loop = results(experts.EXPERTS["loop"].run, low, *problems)
    got = results(experts.EXPERTS[name].run, low, *problems)
    for mine, theirs, exact in zip(got, loop, want, strict=True):
        assert mine.dtype == torch.bfloat16
        assert distance(mine, exact) < 1.5 * distance(theirs, exact) + 1e-3


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("tokens", [1, 2 * ROWS, T])
def test_all_on_one_expert_and_none_on_most(name, tokens):
    chosen = torch.tensor([4, 1, 2]).expand(tokens, K)
    module = module_of("mixtral")
    got = results(experts.EXPERTS[name].run, module, *problem(tokens=tokens, chosen=chosen))
    want = results(transformers_loop, module, *problem(tokens=tokens, chosen=chosen))
    assert max(distance(a, b) for a, b in zip(got, want, strict=True)) < FP32
    assert not got[-1][[0, 3, 5]].any()  # experts without a token: a gradient of zeros, not of what lay there


@pytest.mark.parametrize("name", HERE)
def test_experts_of_other_ranks_count_as_zero(name):
    """Expert parallelism marks them by a number beyond this rank's experts (transformers' AllReduceEP)."""
    module = module_of("mixtral")
    x, chosen, weights = problem()
    off = chosen >= 4
    want = results(transformers_loop, module, x, chosen, weights.masked_fill(off, 0.0).detach().requires_grad_())
    half = module_of("mixtral", num_local_experts=4)
    for p, whole in zip(half.parameters(), module.parameters(), strict=True):
        p.data = whole.data[:4].clone()
    half._is_expert_parallel = True
    y, dx, dw, *rest = results(experts.EXPERTS[name].run, half, x, chosen.clamp(max=4), weights)
    torch.testing.assert_close(y, want[0], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(dx, want[1], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(dw, want[2].masked_fill(off, 0.0), rtol=1e-5, atol=2e-6)
    for mine, theirs in zip(rest, want[3:], strict=True):
        torch.testing.assert_close(mine, theirs[:4], rtol=1e-5, atol=2e-6)


def test_nothing_is_dropped():
    _, chosen, _ = problem()
    pairs, blocks = ordered(chosen, E), blocked(chosen, E)
    assert int(pairs.ends[-1]) == T * K
    assert torch.equal(pairs.order.sort().values, torch.arange(T * K))
    assert torch.equal(chosen.reshape(-1)[pairs.order], pairs.experts)
    assert len(blocks.slot.unique()) == T * K
    for expert, first, rows in blocks.spans:
        inside = (blocks.slot >= first) & (blocks.slot < first + rows)
        assert torch.equal(inside, chosen.reshape(-1) == expert)
        assert rows % ROWS == 0
        assert rows - int(inside.sum()) < ROWS
    assert torch.equal(blocks.token[blocks.slot], torch.arange(T * K) // K)
    with pytest.raises(AssertionError, match="out of range"):
        blocked(chosen + 1, E)


def test_frozen_experts_and_no_gradient_at_all():
    module = module_of("mixtral").requires_grad_(False)
    x, chosen, weights = problem()
    for name in HERE:
        y = experts.EXPERTS[name].run(module, x, chosen, weights)
        assert torch.autograd.grad(y.sum(), [x, weights])[1].abs().sum() > 0
        with torch.no_grad():
            torch.testing.assert_close(experts.EXPERTS[name].run(module, x, chosen, weights), y)


# ----------------------------------------------------------------------------------------------------- choosing by name


def test_auto_measures_what_runs_here_and_says_so():
    model = tiny.model("mixtral", l=2)
    mixture = find_mixtures(model)[0]
    choice = experts.fastest_experts(mixture, tokens=50, rounds=1)
    assert choice.name == min(choice.milliseconds, key=choice.milliseconds.get)
    assert set(choice.milliseconds) == set(HERE)
    assert all(0 < t < 5000 for t in choice.milliseconds.values())
    assert str(choice).startswith(
        f"{choice.name}: 8 experts, top 3, width 104, 50 tokens, float32 on cpu: {choice.name} "
    )
    assert all(p.grad is None for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert "float32 under bfloat16 on cpu" in str(experts.fastest_experts(mixture, tokens=9, rounds=1))
    odd = tiny.model("mixtral", l=1, m=54)
    refusing = experts.fastest_experts(find_mixtures(odd)[0], tokens=9, rounds=1)
    assert refusing.refused == {"grouped_mm": "rows of 54 numbers are no multiple of 16 bytes"}
    assert "; not grouped_mm: rows of 54" in str(refusing)


def test_auto_names_a_kernel_that_fails_and_goes_on(monkeypatch):
    def fails(*_):
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(experts, "EXPERTS", {**experts.EXPERTS, "padded": experts.Backend(fails)})
    mixture = find_mixtures(tiny.model("mixtral", l=1))[0]
    choice = experts.fastest_experts(mixture, tokens=9, rounds=2)
    assert choice.refused == {"padded": "no kernel image is available"}
    assert set(choice.milliseconds) == {"loop", "grouped_mm"}


def test_mistakes_are_told():
    model = tiny.model("mixtral", l=1)
    mixtures = find_mixtures(model)
    with pytest.raises(UsageError, match="no experts backend 'groupedmm'") as told:
        experts.use_experts(model, mixtures, "groupedmm")
    assert told.value.hint == "did you mean grouped_mm?"
    for name, package in (("megablocks", r"grouped_gemm|bfloat16"), ("scattermoe", r"triton|scattermoe|CUDA")):
        with pytest.raises(UsageError, match=package) as told:
            experts.use_experts(model, mixtures, name)
        assert "model.layers.0.mlp" in str(told.value)
    assert model.config._experts_implementation == "grouped_mm"  # transformers' own: nothing was changed


COUNT = """
import sys, torch
from surgery.midtraining import experts, experts_padded
experts.GEMMS = int(sys.argv[1])
experts.keep_compiled_gemms()
x, w = torch.randn(96, 64, dtype=torch.bfloat16), torch.randn(64, 64, dtype=torch.bfloat16)
for again in range(2):
    print("AGAIN" if again else "FIRST", flush=True)
    for rows in range(64, 96):
        x[:rows] @ w
"""


@pytest.mark.slow
def test_onednn_reads_how_many_products_it_keeps():
    """32 shapes do not fit into a cache of 5, so all are compiled again; none is if 50,000 are kept."""
    misses = {}
    for kept in (experts.GEMMS, 5):
        env = {k: v for k, v in os.environ.items() if k != "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
        env |= {"ONEDNN_VERBOSE": "profile_create", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", COUNT, str(kept)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        misses[kept] = done.stdout.partition("AGAIN")[2].count("create:cache_miss")
    if not misses[5]:
        pytest.skip("this processor's bf16 products are not oneDNN's")
    assert misses == {50_000: 0, 5: 32}


def test_a_users_cache_size_stays(monkeypatch):
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    experts.keep_compiled_gemms()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    experts.keep_compiled_gemms()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "50000"
