"""Upcycling: every exact strategy and target against transformers, every formula against plain loops over tensors."""

from __future__ import annotations

import json
import re

import pytest
import torch
from click.testing import CliRunner

import surgery
from surgery.cli import main as cli
from surgery.errors import ConfigError, MismatchError, SurgeryError, UsageError
from surgery.formats.registry import open_checkpoint
from surgery.formats.topology import Topology
from surgery.running.whole import fixed_tokens
from surgery.tensors.gather import Gather, taken
from surgery.tensors.in_memory import InMemory
from surgery.tensors.random import Random, permutation
from surgery.upcycling import proof
from surgery.upcycling.dense_to_moe.build import notes_of, upcycled
from surgery.upcycling.dense_to_moe.settings import Settings
from surgery.upcycling.dense_to_moe.targets import TARGETS
from tests import oracle, tiny
from tests.test_conversion import weights

IDS = torch.randint(0, 264, (2, 24), generator=torch.Generator().manual_seed(11))
L, F, H = tiny.SIZES["l"], tiny.SIZES["f"], tiny.SIZES["h"]


@pytest.fixture(scope="module")
def truth(tiny_hf):
    made = {}

    def get(family):
        if family not in made:
            made[family] = oracle.hf_logits(tiny_hf(family), IDS)
        return made[family]

    return get


@pytest.fixture
def up(tiny_hf, tmp_path):
    """up("llama", experts=8, top_k=2): the folder of an upcycled tiny model; nothing is run to prove it."""
    count = [0]

    def make(family="llama", **keywords):
        count[0] += 1
        out = tmp_path / f"out{count[0]}"
        surgery.upcycle(tiny_hf(family), out, verify_tokens=0, **keywords)
        return out

    return make


COPY = {"experts": 4, "top_k": 2, "strategy": "copy"}
GROUP = {"experts": 8, "top_k": 4, "strategy": "virtual-group", "granularity": 2}
LLAMA = ("mixtral", "granitemoe", "granitemoeshared", "qwen2_moe", "glm4_moe", "ernie4_5_moe")
SHARING = ("granitemoeshared", "qwen2_moe", "glm4_moe", "ernie4_5_moe")
EXACT = [
    *(("llama", t, COPY) for t in LLAMA),
    *(("llama_tied", t, GROUP) for t in LLAMA),
    *(("llama", t, {**COPY, "shared": "0.5"}) for t in SHARING),
    *(("llama", t, {**GROUP, "shared": "72-neurons"}) for t in SHARING if t not in ("glm4_moe", "ernie4_5_moe")),
    *(("llama", t, {**GROUP, "shared": "dense"}) for t in SHARING),
    ("llama", "glm4_moe", {**GROUP, "scale": "router"}),
    ("llama", "mixtral", {**GROUP, "scale": "up-down", "granularity": 4}),
    ("llama", "mixtral", {**GROUP, "order": "random", "router": "kaiming"}),
    ("llama", "mixtral", {"experts": 4, "top_k": 4, "strategy": "partition", "router": "zeros"}),
    ("llama", "mixtral", {**COPY, "strategy": "drop", "reinit": 0.0}),
    ("llama", "qwen2_moe", {**COPY, "normalise": False, "router": "zeros", "top_k": 4}),
    ("llama", "qwen2_moe", {**GROUP, "dense_layers": (0, -1)}),
    ("llama", "glm4_moe", {**COPY, "dense_layers": (0, 1)}),
    ("mistral", "mixtral", GROUP),
    ("qwen2", "qwen2_moe", GROUP),
    ("qwen3", "qwen3_moe", {**GROUP, "dense_layers": (2,)}),
    ("qwen3", "glm4_moe", COPY),
    ("olmo2", "flex_olmo", GROUP),
]


@pytest.mark.parametrize(("family", "target", "settings"), EXACT)
def test_exact_strategies_keep_the_logits(family, target, settings, up, truth):
    out = up(family, target=target, **settings)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == target
    assert float((oracle.hf_logits(out, IDS) - truth(family)).abs().max()) < 1e-4


@pytest.mark.parametrize(("family", "target"), [("llama", "mixtral"), ("qwen2", "qwen2_moe"), ("qwen3", "qwen3_moe"),
                                                ("olmo2", "flex_olmo"), ("mistral", "mixtral")])  # fmt: skip
def test_the_target_is_found(family, target, tiny_hf):
    assert upcycled(open_checkpoint(tiny_hf(family)), Settings(8, 4)).target.family == target


def test_the_default_is_virtual_groups_where_they_fit(tiny_hf):
    source = open_checkpoint(tiny_hf("llama"))
    layouts = {k: upcycled(source, Settings(n, k)).layout for n, k in ((64, 8), (8, 2), (8, 1), (10, 5), (8, 3))}
    assert {k: (x.strategy, x.granularity) for k, x in layouts.items()} == {
        8: ("virtual-group", 8), 2: ("virtual-group", 2), 1: ("copy", 1), 5: ("copy", 1), 3: ("copy", 1)
    }  # fmt: skip


REFUSED = [
    ({**GROUP, "scale": "cbrt"}, "silu is not homogeneous"),
    ({**GROUP, "scale": "none"}, "2 would preserve"),
    ({**GROUP, "scale": "3"}, "the factor is 3"),
    ({**GROUP, "experts": 12, "granularity": 6}, "whole groups"),
    ({**GROUP, "router": "zeros"}, "ties"),
    ({**GROUP, "normalise": False, "target": "qwen2_moe"}, "do not sum"),
    ({"experts": 4, "top_k": 2, "strategy": "partition"}, "2 of the 4 pieces"),
    ({"experts": 4, "top_k": 4, "strategy": "partition"}, "weighted unequally"),
    ({**COPY, "strategy": "drop"}, "drawn anew"),
    ({**COPY, "noise": 0.01}, "noise"),
]


@pytest.mark.parametrize(("settings", "why"), REFUSED)
def test_what_changes_the_function_is_refused_unless_allowed(settings, why, tiny_hf, up, truth, tmp_path):
    with pytest.raises(UsageError, match=why) as error:
        surgery.upcycle(tiny_hf("llama"), tmp_path / "no", **settings)
    assert "--force-lossy" in str(error.value)
    assert not (tmp_path / "no").exists()
    if why == "ties":  # which of the tied experts torch takes is luck
        return
    out = up(force_lossy=True, **settings)
    assert float((oracle.hf_logits(out, IDS) - truth("llama")).abs().max()) > 1e-2


@pytest.mark.parametrize(("family", "target", "why"), [
    ("llama", "qwen3_moe", "query and key norms"), ("llama", "olmoe", "query and key norms"),
    ("olmo2", "mixtral", "norms: after"), ("qwen2", "mixtral", "biases of queries"), ("llama", "gpt2", "no target"),
])  # fmt: skip
def test_families_that_cannot_hold_the_model_say_why(family, target, why, tiny_hf):
    with pytest.raises(SurgeryError, match=why):
        upcycled(open_checkpoint(tiny_hf(family)), Settings(4, 2, target=target))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "mixtral"])
def test_models_that_cannot_be_upcycled_are_refused(family, tiny_hf):
    with pytest.raises(ConfigError):
        upcycled(open_checkpoint(tiny_hf(family)), Settings(4, 2))


@pytest.mark.parametrize("settings", [
    {"experts": 2, "top_k": 3}, {"experts": 5, "top_k": 5, "strategy": "partition"},
    {"experts": 8, "top_k": 2, "shared": "200-neurons"},
    {"experts": 8, "top_k": 2, "dense_layers": (9,)}, {"experts": 8, "top_k": 2, "dense_layers": tuple(range(6))},
    {"experts": 8, "top_k": 4, "granularity": 3},
    {"experts": 9, "top_k": 4, "granularity": 2, "strategy": "virtual-group"},
    {"experts": 8, "top_k": 2, "strategy": "copy", "granularity": 2}, {"experts": 8, "top_k": 2, "strategy": "mix"},
    {"experts": 8, "top_k": 2, "router": "normal:-1"}, {"experts": 8, "top_k": 2, "router": "kaiming:0.1"},
    {"experts": 8, "top_k": 2, "router": "zeros:0", "strategy": "copy"}, {"experts": 8, "top_k": 2, "shared": "1.5"},
])  # fmt: skip
def test_numbers_that_do_not_fit_are_refused(settings, tiny_hf):
    with pytest.raises(UsageError):
        upcycled(open_checkpoint(tiny_hf("llama")), Settings(**settings))


# ------------------------------------------------------------------------------- formulas, by plain loops over tensors


def dense_mlp(folder, layer):
    stored = weights(folder)
    return [stored[f"model.layers.{layer}.mlp.{x}_proj.weight"] for x in ("gate", "up", "down")]


def expert(folder, layer, e):
    stored = weights(folder)
    return [stored[f"model.layers.{layer}.block_sparse_moe.experts.{e}.w{x}.weight"] for x in (1, 3, 2)]


def router_of(folder, layer):
    return weights(folder)[f"model.layers.{layer}.block_sparse_moe.gate.weight"]


def test_copy_by_a_loop(up, tiny_hf):
    out = up(**COPY)
    for layer in (0, L - 1):
        for e in range(4):
            for got, want in zip(expert(out, layer, e), dense_mlp(tiny_hf("llama"), layer), strict=True):
                assert oracle.same_bits(got, want)
    rows = torch.stack([router_of(out, i) for i in range(L)])
    assert abs(float(rows.std()) - 0.02) < 0.002
    assert abs(float(rows.mean())) < 0.002
    assert len({tuple(r.tolist()) for r in rows.flatten(0, 1)}) == 4 * L


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_virtual_groups_by_the_formula(dtype, tmp_path):
    """Expert e is shard e mod G of group e div G; W_d is times G; the rows of a group are one row."""
    source = tiny.save("llama", tmp_path / "source", dtype)
    surgery.upcycle(source, tmp_path / "out", experts=16, top_k=8, granularity=4, verify_tokens=0)
    g, f = 4, F // 4
    for layer in (0, L - 1):
        gate, up_, down = dense_mlp(source, layer)
        router = router_of(tmp_path / "out", layer)
        for e in range(16):
            s = e % g
            mine = expert(tmp_path / "out", layer, e)
            assert oracle.same_bits(mine[0], gate[s * f : (s + 1) * f])
            assert oracle.same_bits(mine[1], up_[s * f : (s + 1) * f])
            assert oracle.same_bits(mine[2], down[:, s * f : (s + 1) * f] * 4)
            assert torch.equal(router[e], router[e // g * g])
            assert e < g or not torch.equal(router[e], router[e - g])


def test_factors_on_up_and_down_and_the_cube_root(up, tiny_hf):
    gate, up_, down = (t[:36] if i < 2 else t[:, :36] for i, t in enumerate(dense_mlp(tiny_hf("llama"), 0)))
    both = expert(up(experts=16, top_k=8, granularity=4, scale="up-down"), 0, 4)
    assert all(torch.equal(a, b) for a, b in zip(both, (gate, up_ * 2, down * 2), strict=True))
    third = expert(up(experts=16, top_k=8, granularity=4, scale="cbrt", force_lossy=True), 0, 4)
    for got, want in zip(third, (gate, up_, down), strict=True):
        torch.testing.assert_close(got, want * 4 ** (1 / 3))


@pytest.mark.parametrize("order", ["sequential", "random"])
def test_partition_covers_every_neuron_once(order, up, tiny_hf):
    out = up(experts=4, top_k=2, strategy="partition", order=order, force_lossy=True, seed=5)
    gate, up_, down = dense_mlp(tiny_hf("llama"), 1)
    seen = []
    for e in range(4):
        a, b, c = expert(out, 1, e)
        for j in range(F // 4):
            i = next(i for i in range(F) if torch.equal(gate[i], a[j]))
            assert torch.equal(up_[i], b[j])
            assert torch.equal(down[:, i] * 2, c[:, j])  # N / k
            seen.append(i)
    assert sorted(seen) == list(range(F))
    assert (seen == list(range(F))) == (order == "sequential")


@pytest.mark.parametrize(("indices", "share"), [("shared", 0.5), ("independent", 0.5), ("shared", 0.25)])
def test_drop_redraws_neurons_by_their_own_statistics(indices, share, up, tiny_hf):
    out = up(**{**COPY, "strategy": "drop"}, reinit=share, reinit_indices=indices, force_lossy=True)
    dense = dense_mlp(tiny_hf("llama"), 2)
    kept = []
    for e in range(4):
        mine = expert(out, 2, e)
        same = [(a == b).all(1) if i < 2 else (a == b).all(0) for i, (a, b) in enumerate(zip(mine, dense, strict=True))]
        for i, (a, b, keep) in enumerate(zip(mine, dense, same, strict=True)):
            assert int(keep.sum()) == F - round(share * F)
            old, new = (b, a) if i < 2 else (b.T, a.T)
            old, new = old[~keep], new[~keep]
            assert abs(float(new.std() / old.std()) - 1) < 0.05
            assert abs(float(new.mean() - old.mean())) < 0.05 * float(old.std())
        kept.append(int((same[0] & same[1] & same[2]).sum()))
        if e:
            assert not torch.equal(mine[0], expert(out, 2, 0)[0])
    expected = F - round(share * F) if indices == "shared" else F * (1 - share) ** 3
    assert all(abs(k - expected) <= (0 if indices == "shared" else 12) for k in kept)


def test_noise_is_relative(up, tiny_hf):
    out = up(**COPY, noise=0.1, force_lossy=True)
    for got, want in zip(expert(out, 3, 2), dense_mlp(tiny_hf("llama"), 3), strict=True):
        assert abs(float((got - want).std() / want.std()) - 0.1) < 0.005


def test_a_mix_of_models(tmp_path, tiny_hf, up):
    from safetensors.torch import save_file

    other = tmp_path / "other"  # the first model with other numbers
    stored = weights(tiny_hf("llama"))
    generator = torch.Generator().manual_seed(1)
    changed = {k: v + 0.01 * torch.randn(v.shape, generator=generator) for k, v in stored.items()}
    other.mkdir()
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    (other / "config.json").write_bytes((tiny_hf("llama") / "config.json").read_bytes())
    out = up(experts=4, top_k=2, strategy="mix", sources=[str(other)], force_lossy=True)
    for e in range(4):
        want = dense_mlp(tiny_hf("llama") if e < 2 else other, 4)
        assert all(oracle.same_bits(a, b) for a, b in zip(expert(out, 4, e), want, strict=True))
    name = "model.layers.4.self_attn.q_proj.weight"
    assert torch.equal(weights(out)[name], (stored[name] + changed[name]) / 2)
    first = up(experts=4, top_k=2, strategy="mix", sources=[str(other)], attention="first", force_lossy=True)
    assert oracle.same_bits(weights(first)[name], stored[name])


@pytest.mark.slow
def test_seeds_give_the_same_bits_in_blocks_of_any_size(up):
    asked = {**COPY, "strategy": "drop", "noise": 0.01, "force_lossy": True}
    wide, narrow, other = up(**asked), up(**asked, max_memory=1 << 18), up(**asked, seed=1)
    data = [(folder / "model.safetensors").read_bytes() for folder in (wide, narrow, other)]
    assert data[0] == data[1]
    assert data[0] != data[2]


# ------------------------------------------------------------------------------------------------------ other programs


def test_mergekit_makes_the_same_experts(up, tiny_hf, tmp_path):
    """mergekit-moe with one model four times is a copy; its router is its own."""
    moe = pytest.importorskip("mergekit.moe")
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.options import MergeOptions

    source = str(tiny_hf("llama"))
    config = MoEMergeConfig.model_validate({
        "base_model": source, "gate_mode": "random", "dtype": "float32",
        "experts": [{"source_model": source, "positive_prompts": ["x"]} for _ in range(4)],
    })  # fmt: skip
    architecture = next(a for a in moe.ALL_OUTPUT_ARCHITECTURES if a.name() == "Mixtral")
    architecture.write_model(str(tmp_path / "kit"), config, MergeOptions(copy_tokenizer=False),
                             [torch.zeros(4, H)] * L)  # fmt: skip
    ours, theirs = open_checkpoint(up(**COPY)), open_checkpoint(tmp_path / "kit")
    assert ours.parts.keys() == theirs.parts.keys()
    for name in ours.parts:
        if not name.endswith("router"):
            assert torch.equal(ours.parts[name].full(), theirs.parts[name].full()), name
    fields = ours.spec.differences(theirs.spec).keys()
    assert fields <= {"positions"}, fields


def test_through_megatron_and_back_changes_nothing(up, tiny_hf, tmp_path):
    direct = up(**GROUP)
    surgery.upcycle(tiny_hf("llama"), tmp_path / "dist", to="megatron-dist", topology=Topology(ep=2), verify_tokens=32,
                    options={"vocab_multiple": "8"}, **GROUP)  # fmt: skip
    surgery.convert(tmp_path / "dist", tmp_path / "back", to="hf")
    a, b = weights(direct), weights(tmp_path / "back")
    assert a.keys() == b.keys()
    assert all(oracle.same_bits(a[k], b[k]) for k in a)


@pytest.mark.parametrize("target", [*LLAMA, "qwen3_moe", "flex_olmo"])
def test_the_names_are_those_that_vllm_loads(target, up):
    known = json.loads((oracle.GOLDEN / "vllm" / "names.json").read_text())
    shared = {"shared": "dense"} if target in SHARING else {}
    source = {"qwen3_moe": "qwen3", "flex_olmo": "olmo2"}.get(target, "llama_tied")
    out = up(source, **{**GROUP, "target": target, **shared})
    names = {re.sub(r"experts\.\d+", "experts.{e}", re.sub(r"layers\.\d+", "layers.{l}", n)) for n in weights(out)}
    expected = {*known["always"], *known[target]} - {*known["never"].get(target, ())}
    assert names == expected | ({"lm_head.weight"} if source != "llama_tied" else set())
    config = json.loads((out / "config.json").read_text())
    for key in ("rms_norm_eps", "rope_theta", "tie_word_embeddings", "num_key_value_heads", "torch_dtype",
                "max_position_embeddings", "hidden_act", "vocab_size"):  # fmt: skip
        assert key in config, key
    if "num_experts" in config:
        assert config["num_experts"] == config.get("num_local_experts", config.get("moe_num_experts")) == 8


def test_what_llama_cpp_makes_of_a_qwen2_moe_is_told(tiny_hf):
    told = {family: [note for note in upcycled(open_checkpoint(tiny_hf(family)), Settings(4, 2)).checkpoint.notes
                     if note.startswith("llama.cpp")] for family in ("qwen2", "llama")}  # fmt: skip
    assert told["llama"] == []
    assert ["NaN" in told["qwen2"][0], "does not divide" in told["qwen2"][1]] == [True, True]


@pytest.mark.parametrize(("settings", "told"), [(GROUP, True), ({**COPY, "top_k": 4, "router": "zeros",
                                                                 "normalise": False}, False)])  # fmt: skip
def test_what_vllm_makes_of_an_olmoe_is_told(settings, told, tiny_hf):
    """A flex_olmo it runs by transformers' classes, as transformers does."""
    source = open_checkpoint(tiny_hf("olmo2"))
    made = upcycled(source, Settings(**settings))
    assert made.target.family == "flex_olmo" and not any("vLLM" in note for note in made.checkpoint.notes)
    notes = notes_of(source.spec, made.checkpoint.spec, made.layout, TARGETS["olmoe"])
    assert any("vLLM does not divide" in note for note in notes) == told


# --------------------------------------------------------------------------------------------------------- the proof


def test_the_proof_measures_what_transformers_computes(tiny_hf, tmp_path, truth):
    done = surgery.upcycle(tiny_hf("llama"), tmp_path / "out", verify_tokens=48, **{**COPY, "strategy": "drop"},
                           force_lossy=True)  # fmt: skip
    record = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert record["proof"] == done.proof.to_json()
    assert done.proof.verdict == "not preserving, as asked"
    assert done.proof.intact == 0.5
    tokens = fixed_tokens(264, 1, 48)
    a, b = oracle.hf_logits(tmp_path / "out", tokens), oracle.hf_logits(tiny_hf("llama"), tokens)
    assert done.proof.fp32.max_diff == pytest.approx(float((a - b).abs().max()), rel=1e-3)
    p, q = b.double().log_softmax(-1), a.double().log_softmax(-1)
    assert done.proof.fp32.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    loss = torch.nn.functional.cross_entropy(a[0, :-1], tokens[0, 1:])
    assert done.proof.fp32.perplexity == pytest.approx(float(loss.exp()), rel=1e-3)
    assert record["source_digest"] == surgery.convert(tiny_hf("llama"), tmp_path / "same", to="hf").content_digest
    assert record["content_digest"] != record["source_digest"]


def test_bf16_is_shown_beside_its_noise_floor(tmp_path):
    source = tiny.save("llama", tmp_path / "source", "bfloat16")
    done = surgery.upcycle(source, tmp_path / "out", verify_tokens=64, **GROUP)
    found = done.proof
    assert found.verdict in ("exact", "exact up to bf16 ties")
    assert found.fp32.max_diff < 1e-4
    assert found.floor.kl > 1e-7
    assert found.ties.choices == 64 * L
    assert (found.ties.incomplete > 0) == (found.verdict != "exact")


def test_an_exact_strategy_that_is_not_exact_is_an_error(tiny_hf, tmp_path, monkeypatch):
    from surgery.upcycling.dense_to_moe import resolve

    monkeypatch.setattr(resolve, "_placed", lambda wanted, total: (1.0, 1.0, total * 1.01, None))
    monkeypatch.setattr(resolve, "_losses", lambda *_: [])
    with pytest.raises(MismatchError, match="should preserve the function"):
        surgery.upcycle(tiny_hf("llama"), tmp_path / "out", verify_tokens=32, **GROUP)
    assert not (tmp_path / "out").exists()


def test_ties_and_incomplete_groups_are_counted(tiny_hf):
    from surgery.running.layerwise import Route

    made = upcycled(open_checkpoint(tiny_hf("llama")), Settings(8, 4, granularity=2))
    logits = torch.tensor([[4.0, 4, 3, 3, 2, 2, 1, 1], [4, 4, 3, 3, 3, 3, 1, 1], [4, 4, 3, 3, 3, 3, 1, 1]])
    chosen = torch.tensor([[0, 1, 3, 2], [0, 1, 2, 3], [1, 0, 4, 2]])
    ties = proof._ties({0: Route(logits, chosen)}, made.claim())
    assert (ties.choices, ties.tied, ties.incomplete) == (3, 2, 1)


# ------------------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize("dim", [0, 1])
def test_gathers_read_any_box(dim, monkeypatch):
    from surgery.tensors import gather as nodes

    monkeypatch.setattr(nodes, "WINDOW", 64)
    monkeypatch.setattr(nodes, "GAP", 16)
    data = torch.arange(40 * 30, dtype=torch.float32).reshape(40, 30)
    index = [3, 29, 0, 7, 7, 8, 28, 5, 12]
    lazy, want = Gather(InMemory(data), dim, index), data.index_select(dim, torch.tensor(index))
    assert torch.equal(lazy.full(), want)
    for a in range(len(index)):
        for b in range(a, len(index) + 1):
            box = ((a, b), (4, 21)) if dim == 0 else ((4, 21), (a, b))
            assert torch.equal(lazy.read(box), want[tuple(slice(*s) for s in box)])
    assert taken(InMemory(data), dim, range(data.shape[dim])).shape == data.shape


def test_random_numbers_depend_on_their_place_alone():
    lazy = Random((50, 70), "float32", "x", seed=3, std=2.0)
    whole = lazy.full()
    assert torch.equal(lazy.read(((7, 31), (11, 12))), whole[7:31, 11:12])
    assert torch.equal(torch.cat([lazy.read(((i, i + 1), (0, 70))) for i in range(50)]), whole)
    assert abs(float(whole.std()) - 2) < 0.1
    assert not torch.equal(whole, Random((50, 70), "float32", "y", seed=3, std=2.0).full())
    flat = Random((100_000,), "float64", "z", seed=0).full()
    assert abs(float(flat.mean())) < 0.02
    assert abs(float((flat.abs() < 1).double().mean()) - 0.6827) < 0.01
    even = Random((100_000,), "float64", "z", seed=0, bound=0.5).full()
    assert float(even.abs().max()) <= 0.5
    assert abs(float(even.std()) - 0.5 / 3**0.5) < 0.005
    assert sorted(permutation(0, "n", 100)) == list(range(100))


# ------------------------------------------------------------------------------------------------------------ the CLI


def run(*words):
    return CliRunner().invoke(cli.main, [str(w) for w in words])


def test_the_command_line(tiny_hf, tmp_path):
    source = tiny_hf("llama")
    shown = run("upcycle", source, tmp_path / "moe", "--experts", 8, "--top-k", 4, "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert "virtual-group" in shown.output
    assert "exact" in shown.output
    data = json.loads(
        run("upcycle", source, tmp_path / "moe", "--experts", 8, "--top-k", 4, "--dry-run", "--json").output
    )
    assert data["upcycling"]["target"] == "mixtral"
    assert not (tmp_path / "moe").exists()
    done = run("upcycle", source, tmp_path / "moe", "--experts", 8, "--top-k", 4, "--verify-tokens", 32)
    assert done.exit_code == 0, done.output
    assert "proof  exact" in done.output
    again = run("upcycle", source, tmp_path / "moe", "--experts", 8, "--top-k", 4)
    assert again.exit_code == 1
    assert "exists already" in again.output
    refused = run("upcycle", source, tmp_path / "x", "--experts", 8, "--top-k", 4, "--scale", "cbrt")
    assert refused.exit_code == 2
    assert "--force-lossy" in refused.output


IGNORED = [
    ("llama", "upcycle --experts 4 --top-k 2 --reinit 0.3", "--reinit belongs to --strategy drop"),
    ("llama", "upcycle --experts 4 --top-k 2 --reinit-indices independent", "--reinit-indices belongs"),
    ("llama", "upcycle --experts 4 --top-k 2 --attention first", "--attention belongs to --strategy mix"),
    ("llama", "upcycle --experts 4 --top-k 2 --text /nowhere.txt", "neither does"),
    ("llama", "upcycle --experts 4 --top-k 2 --strategy copy --router zeros:0.1", "ties"),
    ("llama", "upcycle --experts 4 --top-k 2 --router kaiming:0.1", "kaiming takes no number"),
    ("llama", "upcycle --attention-experts 2 --router kmeans", "--experts, --top-k are missing"),
    ("llama", "upcycle --attention-experts 2 --tp 2", "no --tp 2"),
    ("llama", "upcycle --experts 4 --top-k 2 --attention-experts 2 --attention first", "--attention belongs"),
    (
        "llama",
        "upcycle --experts 4 --top-k 2 --attention-experts 2 --strategy mix --source x --force-lossy",
        "--source",
    ),
    ("llama", "upcycle --attention-top-k 2", "--attention-experts"),
    ("mixtral", "upcycle --collapse --experts 8", "does not go with --experts"),
    ("mixtral", "upcycle --collapse --seed 1 --recipe x", "does not go with --seed, --recipe"),
    ("mixtral", "upcycle --collapse --dtype bf16", "does not go with --dtype"),
    ("mixtral", "experts --top-k 2 --noise 0.1 --force-lossy", "--duplicate"),
    ("mixtral", "experts --duplicate 9000", "72000 experts"),
]


@pytest.mark.parametrize(("family", "words", "why"), IGNORED)
def test_what_would_be_ignored_is_refused(family, words, why, tiny_hf, tmp_path):
    command, *flags = words.split()
    done = run(command, tiny_hf(family), tmp_path / "out", *flags)
    assert done.exit_code == 2, done.output
    assert why in done.output
    assert not list(tmp_path.iterdir())


def test_recipes(tiny_hf, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("experts: 4\ntop_k: 2\nstrategy: copy\nshared: 0.5\ndense-layers: [0]\n")
    words = ("upcycle", tiny_hf("llama"), tmp_path / "moe", "--recipe", recipe, "--dry-run", "--json")
    found = json.loads(run(*words, "--experts", 8).output)["upcycling"]
    assert (found["experts"], found["strategy"], found["shared_width"], found["dense_layers"]) == (8, "copy", 72, [0])
    mistakes = {
        "expert: 4": "did you mean experts?",
        "experts: 4\ntop_k: 2\nstrategy: coppy": "mean copy?",
        "experts: four\ntop_k: 2": "experts",
        "[1]": "recipe",
        "top_k: 2": "--experts",
    }
    for text, hint in mistakes.items():
        recipe.write_text(text)
        bad = run(*words)
        assert bad.exit_code in (1, 2), bad.output
        assert hint in bad.output
        assert "Traceback" not in bad.output


def test_keywords_that_do_not_exist_are_told(tiny_hf, tmp_path):
    with pytest.raises(TypeError, match=r"upcycle\(\).*'expert'; did you mean experts\?"):
        surgery.upcycle(tiny_hf("llama"), tmp_path / "x", expert=4, top_k=2)
