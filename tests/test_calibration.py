"""Clusters, importance and routers from a text, against plain computations by transformers and autograd."""

from __future__ import annotations

import json

import pytest
import torch

import surgery
from surgery.checkpoint import open_checkpoint
from surgery.errors import ConfigError, SurgeryError, UsageError
from surgery.upcycling import clusters
from surgery.upcycling.build import upcycled
from surgery.upcycling.calibrate import scaled_rows
from surgery.upcycling.layerwise import backward, forward
from surgery.upcycling.proof import fixed_tokens
from surgery.upcycling.settings import Settings
from tests import oracle, tiny
from tests.test_conversion import weights

L, F = tiny.SIZES["l"], tiny.SIZES["f"]
PARTS = {"experts": 4, "top_k": 2, "strategy": "partition", "force_lossy": True}


def observed(folder, tokens):
    """What transformers' own model sees: mlp inputs, inputs of down, and the loss's slopes there."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    x, h = {}, {}

    def keep(store, i):
        def hook(_, args):
            args[0].retain_grad() if args[0].requires_grad else None
            store[i] = args[0]

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(keep(x, i))
        layer.mlp.down_proj.register_forward_pre_hook(keep(h, i))
    logits = model(tokens).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return x, h


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
def test_layer_by_layer_is_the_whole_model(family, tiny_hf):
    tokens = fixed_tokens(264, 2, 24)
    x, h = observed(tiny_hf(family), tokens)
    checkpoint, seen = open_checkpoint(tiny_hf(family)), []
    want = oracle.hf_logits(tiny_hf(family), tokens)
    assert float((forward(checkpoint, tokens, "float32").logits - want).abs().max()) < 1e-5

    def compare(layer, given, inside, slope):
        seen.append(layer)
        torch.testing.assert_close(given, x[layer].detach().flatten(0, 1), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(inside, h[layer].detach().flatten(0, 1), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(slope, h[layer].grad.flatten(0, 1), rtol=1e-3, atol=1e-7)

    backward(checkpoint, tokens, compare)
    assert seen == list(reversed(range(L)))


def test_clusters_are_found_and_equal():
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(5, 40, generator=generator), dim=1)
    truth = torch.arange(60) % 5
    x = centres[truth] * torch.rand(60, 1, generator=generator).add(0.5) + 0.02 * torch.randn(
        60, 40, generator=generator
    )
    found, label = clusters.kmeans(x, 5, seed=1)
    assert len({(int(a), int(b)) for a, b in zip(truth, label, strict=True)}) == 5
    assert torch.equal((x @ found.T).argmax(1), label)
    assert torch.bincount(clusters.balanced(torch.randn(60, 40, generator=generator), 6)).tolist() == [10] * 6


def test_the_most_important_neurons_go_first():
    scores = torch.tensor([[9.0, 8, 1, 0, 2, 3], [7.0, 9, 5, 4, 0, 1]])
    assert clusters.assigned(scores, 3) == [[0, 4, 5], [1, 2, 3]]
    assert clusters.assigned(scores, 3, sharing=True) == [[0, 1, 5], [0, 1, 2]]
    assert clusters.residual(scores, 3, 2) == [0, 1]


@pytest.mark.parametrize("order", ["clustering", "co-activation", "gradient"])
def test_guided_partitions_cover_every_neuron_once(order, tiny_hf):
    made = upcycled(open_checkpoint(tiny_hf("llama")), Settings(**PARTS, order=order))
    for shared, experts in made.pieces.values():
        assert shared is None
        assert sorted(i for piece in experts for i in piece.neurons) == list(range(F))
        assert [len(piece.neurons) for piece in experts] == [F // 4] * 4
    sequential = upcycled(open_checkpoint(tiny_hf("llama")), Settings(**PARTS))
    assert [list(p.neurons) for p in made.pieces[2][1]] != [list(p.neurons) for p in sequential.pieces[2][1]]


def test_importance_by_a_loop(tiny_hf):
    """The score of a neuron for an expert is |h dL/dh| summed over the tokens of the expert's cluster."""
    from surgery.upcycling.proof import prose_tokens

    checkpoint = open_checkpoint(tiny_hf("llama"))
    made = upcycled(checkpoint, Settings(**PARTS, order="gradient", sharing=True))
    x, h = observed(tiny_hf("llama"), prose_tokens(checkpoint, 512)[0])
    layer = 3
    _, label = clusters.kmeans(x[layer].detach().flatten(0, 1), 4, 0)
    value = (h[layer] * h[layer].grad).abs().detach().flatten(0, 1).double()
    for e in range(4):
        score = sum(value[t] for t in range(len(value)) if int(label[t]) == e)
        mine = set(made.pieces[layer][1][e].neurons)
        assert len(mine & set(score.topk(F // 4).indices.tolist())) >= F // 4 - 1  # but for a tie of rounding


def test_residual_experts_hold_what_all_want(tiny_hf, tmp_path):
    done = surgery.upcycle(tiny_hf("llama"), tmp_path / "out", experts=3, top_k=1, strategy="partition", shared="36",
                           order="gradient", router="kmeans", force_lossy=True, verify_tokens=32)  # fmt: skip
    for shared, experts in done.made.pieces.values():
        assert len(shared.neurons) == 36
        assert sorted([*shared.neurons, *(i for piece in experts for i in piece.neurons)]) == list(range(F))
    assert done.made.target.family == "granitemoeshared"
    assert done.proof.verdict == "not preserving, as asked"
    assert done.proof.intact < 1 or done.made.layout.down == 3


def test_guided_virtual_groups_stay_exact(tiny_hf, tmp_path):
    done = surgery.upcycle(tiny_hf("llama"), tmp_path / "out", experts=8, top_k=4, granularity=4, order="clustering",
                           router="kmeans", verify_tokens=32)  # fmt: skip
    assert done.proof.verdict == "exact"


def test_kmeans_rows_point_where_the_tokens_are(tiny_hf, tmp_path):
    from surgery.upcycling.proof import prose_tokens

    surgery.upcycle(tiny_hf("llama"), tmp_path / "out", experts=4, top_k=2, strategy="copy", router="kmeans",
                    verify_tokens=0)  # fmt: skip
    x, _ = observed(tiny_hf("llama"), prose_tokens(open_checkpoint(tiny_hf("llama")), 512)[0])
    stored = weights(tmp_path / "out")
    for layer in (0, L - 1):
        rows = stored[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        seen = torch.nn.functional.normalize(x[layer].detach().flatten(0, 1), dim=1)
        label = (seen @ rows.T).argmax(1)
        for c in range(4):  # each row is the mean direction of the tokens that choose it
            mean = torch.nn.functional.normalize(seen[label == c].mean(0), dim=0)
            assert float(mean @ torch.nn.functional.normalize(rows[c], dim=0)) > 0.98
        torch.testing.assert_close(rows.norm(dim=1), torch.full((4,), 0.02 * 120**0.5), rtol=1e-4, atol=0)


@pytest.fixture
def speaking(tmp_path):
    """A tiny llama with a tokenizer."""
    from tests.test_recipes import build

    build(tmp_path / "speaking", heads=4, groups=2)
    return tmp_path / "speaking"


@pytest.mark.parametrize("start", ["prompts", "domains"])
def test_routers_from_prompts(start, speaking, tmp_path):
    entries = [["king queen king", "king"], {"positive": ["river tower"], "negative": ["king"]}]
    if start == "domains":
        for name in ("a", "b"):
            (tmp_path / f"{name}.txt").write_text("king queen king" if name == "a" else "river tower river")
        entries = [["a.txt"], "b.txt"]
    (tmp_path / "list.yaml").write_text(json.dumps(entries))
    surgery.upcycle(speaking, tmp_path / "out", experts=2, top_k=1, strategy="copy", verify_tokens=0,
                    router=f"{start}:{tmp_path / 'list.yaml'}")  # fmt: skip
    routes = {}
    made = open_checkpoint(tmp_path / "out")
    for word, ids in (("king", [10, 11]), ("river", [8, 9])):
        run = forward(made, torch.tensor([ids * 3]), "float32")
        routes[word] = run.routes[1].logits.mean(0)
    assert routes["king"][0] > routes["king"][1]
    assert routes["river"][1] > routes["river"][0]


@pytest.mark.parametrize("text", ["[]", "a: 1", "- 3\n- x", "- {positive: x, other: y}\n- z", "- [1]\n- x"])
def test_bad_lists_of_prompts_are_told(text, speaking, tmp_path):
    (tmp_path / "list.yaml").write_text(text)
    with pytest.raises(ConfigError):
        upcycled(open_checkpoint(speaking), Settings(2, 1, router=f"prompts:{tmp_path / 'list.yaml'}"))


def test_what_a_text_needs_is_told(tiny_hf, tmp_path):
    (tmp_path / "text").write_text("Once upon a time.")
    source = open_checkpoint(tiny_hf("llama"))
    with pytest.raises(ConfigError, match=r"no tokenizer.json"):
        upcycled(source, Settings(4, 2, router="kmeans", text=str(tmp_path / "text")))
    with pytest.raises(UsageError, match="needs a file"):
        upcycled(source, Settings(4, 2, router="prompts"))
    with pytest.raises(UsageError, match="--sharing"):
        upcycled(source, Settings(4, 2, sharing=True))
    with pytest.raises(SurgeryError):
        upcycled(source, Settings(4, 2, router=f"prompts:{tmp_path / 'none.yaml'}"))


def test_rows_have_the_length_of_a_normal_router():
    rows = scaled_rows(torch.randn(8, 500))
    assert abs(float(rows.std()) - 0.02) < 0.002
