"""Orders and routers that are measured: clusters, activations and gradients against naive runs of the whole model."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

import surgery
from surgery.cli import main as cli
from surgery.errors import ConfigError, FileError, UsageError
from surgery.formats.registry import open_checkpoint
from surgery.running.activations import Store, each_layer, layer_inputs
from surgery.running.tokens import tokens_of
from surgery.upcycling.dense_to_moe import measures
from surgery.upcycling.dense_to_moe.build import upcycled
from surgery.upcycling.dense_to_moe.clusters import assigned, balanced, unit
from surgery.upcycling.dense_to_moe.prompts import mean_vectors, router_rows
from surgery.upcycling.dense_to_moe.settings import Settings
from tests import oracle, tiny

IDS = torch.randint(0, tiny.SIZES["v"], (2, 24), generator=torch.Generator().manual_seed(3))
ORDERS = ["clustering", "clustering-up", "co-activation", "gradient"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("dense") / "llama", l=2)


@pytest.fixture(scope="module")
def wordy(tmp_path_factory):
    """A dense model with a tokenizer: a word is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tiny.save("llama", tmp_path_factory.mktemp("wordy") / "llama", l=2)
    words = Tokenizer(models.WordLevel({"?": 0} | {f"w{i}": i for i in range(1, 200)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def whole_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def observed(folder, ids, gradients=False):
    """Inputs, hidden and (by autograd through all layers at once) gradients of every mlp."""
    model, inputs, hidden = whole_model(folder), {}, {}
    for i, layer in enumerate(model.model.layers):

        def keep(_, args, i=i):
            if args[0].requires_grad:
                args[0].retain_grad()
            hidden[i] = args[0]

        layer.mlp.register_forward_pre_hook(lambda _, args, i=i: inputs.__setitem__(i, args[0].detach().flatten(0, 1)))
        layer.mlp.down_proj.register_forward_pre_hook(keep)
    logits = model(ids).logits
    if gradients:
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    grads = {i: h.grad.flatten(0, 1) for i, h in hidden.items()} if gradients else {}
    return inputs, {i: h.detach().flatten(0, 1) for i, h in hidden.items()}, grads


def test_clusters_are_balanced_and_find_what_is_there():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 7, generator=generator) * 10
    truth = torch.arange(60) % 5
    rows = centres[truth] + torch.randn(60, 7, generator=generator)
    found = balanced(rows, 5, 0, "x")
    for c in range(5):
        assert len(set(truth[found.members(c)].tolist())) == 1
        assert len(found.members(c)) == 12
    assert torch.equal(balanced(rows, 5, 0, "x").labels, found.labels)
    sizes = torch.bincount(balanced(rows[:57], 5, 1, "y").labels)
    assert sorted(sizes.tolist()) == [11, 11, 11, 12, 12]
    same = balanced(torch.ones(6, 3), 3, 0, "z")  # nothing to tell them by
    assert sorted(same.labels.tolist()) == [0, 0, 1, 1, 2, 2]


def test_the_assignment_is_nearly_the_cheapest():
    """Against scipy's optimum over all balanced assignments."""
    optimise = pytest.importorskip("scipy.optimize")
    for seed in range(8):
        cost = torch.rand(40, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        wide = cost.repeat_interleave(10, 1).numpy()
        best = wide[optimise.linear_sum_assignment(wide)].sum()
        ours = cost.gather(1, assigned(cost)[:, None]).sum()
        assert best - 1e-9 <= ours <= best * 1.05
        assert torch.bincount(assigned(cost)).tolist() == [10] * 4


def test_activations_and_gradients_are_those_of_the_whole_model(dense):
    inputs, hidden, grads = observed(dense, IDS, gradients=True)
    source, seen, order = open_checkpoint(dense), {}, []
    each_layer(source, IDS, lambda i, x, h: seen.__setitem__(i, (x.clone(), h.clone())))
    for i in inputs:
        torch.testing.assert_close(seen[i][0], inputs[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen[i][1], hidden[i], rtol=1e-4, atol=1e-5)
    for kept in (1 << 30, 0):  # in memory, and in a file
        each_layer(source, IDS, lambda i, x, h, g: seen.__setitem__(i, (x, h, g)) or order.append(i), True, kept)
        for i in inputs:
            torch.testing.assert_close(seen[i][1], hidden[i], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(seen[i][2], grads[i], rtol=1e-3, atol=1e-7)
    assert order == [1, 0, 1, 0]
    states = whole_model(dense)(IDS, output_hidden_states=True).hidden_states
    for ours, theirs in zip(layer_inputs(source, IDS), states, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_only_one_layer_is_in_memory(dense):
    """While a layer is shown, the others have no weights."""
    from surgery.running import layerwise

    held = []
    made = layerwise.empty_model

    def watching(*args):
        model = made(*args)
        watching.model = model
        return model

    def look(i, *_):
        layers = watching.model.model.layers
        held.append([j for j, layer in enumerate(layers) if not layer.mlp.up_proj.weight.is_meta])

    from surgery.running import activations as calibration

    calibration.empty_model = watching
    try:
        each_layer(open_checkpoint(dense), IDS, look)
    finally:
        calibration.empty_model = made
    assert held == [[0], [1]]


def test_the_store_keeps_what_it_is_given():
    tensors = [torch.randn(3, 4), torch.randn(5), torch.randn(2, 2)]
    with Store(48) as store:
        for t in tensors:
            store.put(t)
        assert store.file is not None
        for i in (2, 0, 1):
            assert torch.equal(store.get(i), tensors[i])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shared", ["0", "16-neurons"])
def test_with_all_experts_the_function_is_kept(order, shared, dense, tmp_path):
    """Every neuron is in one expert, and only there."""
    target = {"target": "granitemoeshared"} if shared != "0" else {}
    wanted = {"experts": 4, "top_k": 4, "strategy": "partition", "order": order, "router": "zeros", "shared": shared}
    done = surgery.upcycle(dense, tmp_path / "out", text_tokens=64, verify_tokens=32, **wanted, **target)
    assert done.proof.verdict == "exact"
    assert done.proof.intact == 1
    before, after = (oracle.hf_logits(f, IDS) for f in (dense, tmp_path / "out"))
    assert (before - after).abs().max() < 1e-4
    for first, routed in done.made.pieces.values():
        every = [j for p in (*([first] if first else []), *routed) for j in p.neurons]
        assert sorted(every) == list(range(144))
        assert len({len(p.neurons) for p in routed}) == 1


@pytest.mark.parametrize("order", ORDERS)
def test_the_same_seed_gives_the_same_bits(order, dense, tmp_path):
    wanted = {"experts": 4, "top_k": 2, "strategy": "partition", "order": order, "router": "kmeans",
              "text_tokens": 64, "force_lossy": True, "verify_tokens": 0}  # fmt: skip
    digests = [
        surgery.upcycle(dense, tmp_path / str(i), **wanted, seed=seed, max_memory=memory).report.content_digest
        for i, (seed, memory) in enumerate([(0, None), (0, 1 << 16), (1, None)])
    ]
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_clusters_of_gate_rows_against_the_definition(dense):
    """The sum of squared distances within experts is far below that of a cut in sequence."""
    source = open_checkpoint(dense)
    wanted = Settings(4, 4, strategy="partition", order="clustering", router="zeros")
    made = upcycled(source, wanted)
    rows = unit(source.parts["layers.1.mlp.gate"].full())

    def within(groups):
        return sum(float((rows[g] - rows[g].mean(0)).pow(2).sum()) for g in groups)

    found = within([list(p.neurons) for p in made.pieces[1][1]])
    assert found < 0.98 * within([list(range(i, i + 36)) for i in range(0, 144, 36)])


def test_co_activation_puts_together_what_fires_together():
    """Two interleaved sets of neurons that fire on different tokens."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(40, 12, generator=generator) * 0.05
    hidden[:20, ::2] += 1
    hidden[20:, 1::2] -= 1
    made = measures._by_activation(hidden, Settings(2, 1, strategy="partition"), _layout(2, 6, 0), 0)
    assert sorted([sorted(made[:6]), sorted(made[6:])]) == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]


def _layout(n, m, s):
    from surgery.upcycling.dense_to_moe.resolve import Layout

    return Layout("partition", n, 1, 1, 1, m, s, n * m, (), 1.0, 1.0, 1.0, None)


def naive_gradient_split(scores, s, m, sharing):
    """LLaMA-MoE v2's split, word by word."""
    k, f = len(scores), len(scores[0])
    tops = [sorted(range(f), key=lambda j: (-row[j], j))[:m] for row in scores]
    shared = []
    for repeats in range(k, -1, -1):  # those in the lists of most experts first
        level = [j for j in range(f) if sum(j in top for top in tops) == repeats]
        shared += sorted(level, key=lambda j: (-sum(row[j] for row in scores), j))
    shared = sorted(shared[:s])
    left = [j for j in range(f) if j not in shared]
    if sharing:
        return shared, [sorted(sorted(left, key=lambda j: (-row[j], j))[:m]) for row in scores]
    groups = [[] for _ in range(k)]
    while left:
        _, c, j = min((-scores[c][j], c, j) for c in range(k) for j in left if len(groups[c]) < m)
        groups[c].append(j)
        left.remove(j)
    return shared, [sorted(g) for g in groups]


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("s", [0, 6])
def test_the_gradient_split_against_a_plain_one(s, sharing):
    scores = torch.rand(4, 30, generator=torch.Generator().manual_seed(s), dtype=torch.float64)
    m = (30 - s) // 4
    scores = scores[:, : s + 4 * m]
    got = measures.by_importance(scores, s, m, sharing)
    shared, groups = naive_gradient_split(scores.tolist(), s, m, sharing)
    assert got[:s] == shared
    assert [got[s + m * c : s + m * (c + 1)] for c in range(4)] == groups


def test_gradient_importance_end_to_end(dense):
    """From the whole model's autograd to the neurons of every expert."""
    source = open_checkpoint(dense)
    wanted = Settings(4, 2, strategy="partition", order="gradient", router="kmeans", text_tokens=48,
                      sharing=True, force_lossy=True)  # fmt: skip
    ids = tokens_of(source, None, 48)
    inputs, hidden, grads = observed(dense, ids, gradients=True)
    made = upcycled(source, wanted)
    for layer in (0, 1):
        labels = measures.token_clusters(inputs[layer], 4, 0, layer)[0].labels
        rows = made.checkpoint.parts[f"layers.{layer}.router"].full()
        for c, piece in enumerate(made.pieces[layer][1]):
            score = (hidden[layer] * grads[layer]).abs()[labels == c].sum(0)
            best = set(score.topk(36).indices.tolist())
            assert len(best & set(piece.neurons)) >= 35  # ties of rounding
        routed = (inputs[layer] @ rows.T).argmax(1)
        assert float((routed == labels).float().mean()) > 0.6  # the clusters' own experts; they are balanced by force
    with pytest.raises(UsageError, match="experts take the same neurons"):
        upcycled(source, Settings(4, 4, strategy="partition", order="gradient", router="zeros", sharing=True))
    with pytest.raises(UsageError, match="--sharing belongs to"):
        upcycled(source, Settings(4, 4, strategy="partition", sharing=True))


def test_a_kmeans_router_sends_clusters_to_different_experts():
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(1, 16, generator=generator) * 5  # all tokens have much in common, as in real models
    truth = torch.arange(80) % 4
    centres = torch.randn(4, 16, generator=generator)
    x = common + centres[truth] + 0.05 * torch.randn(80, 16, generator=generator)
    rows = measures.kmeans_rows(x, 4, 0, 0)
    logits = x.double() @ rows.T
    for c in range(4):
        assert len(set(logits.argmax(1)[truth == c].tolist())) == 1
    assert len(set(logits.argmax(1).tolist())) == 4
    assert float((logits - logits.mean(1, keepdim=True)).pow(2).mean().sqrt()) == pytest.approx(1)


@pytest.mark.parametrize("settings", [{"experts": 4, "top_k": 2, "strategy": "copy"}, {"experts": 8, "top_k": 4}])
def test_a_measured_router_keeps_the_function(settings, dense, tmp_path):
    done = surgery.upcycle(dense, tmp_path / "out", router="kmeans:0.5", text_tokens=64, verify_tokens=32,
                           **settings)  # fmt: skip
    assert done.proof.verdict == "exact"
    rows = open_checkpoint(tmp_path / "out").parts["layers.0.router"].full()
    g = done.made.layout.granularity
    assert all(torch.equal(rows[i], rows[i // g * g]) for i in range(len(rows)))
    assert len({tuple(r.tolist()) for r in rows}) == len(rows) // g


def test_prompts_against_mergekit(wordy):
    router = pytest.importorskip("mergekit.moe.router")
    source, model = open_checkpoint(wordy), whole_model(wordy)
    prompts = ["w3 w14 w15 w92", "w65 w35 w89 w79"]
    ids = torch.tensor([[int(w[1:]) for w in p.split()] for p in prompts])

    class Encoding(dict):
        def to(self, _):
            return self

    encoded = Encoding(input_ids=ids, attention_mask=torch.ones_like(ids))
    for pick, average in (("last", False), ("mean", True)):
        theirs = router.get_hidden_states(model, encoded, average=average)
        ours = mean_vectors(source, prompts, "hidden", pick)
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-5)
    theirs = router.get_cheap_embedding(model.model.embed_tokens.weight.detach(), encoded, 2, 264)
    torch.testing.assert_close(mean_vectors(source, prompts, "cheap_embed", "last").float(), theirs)


def test_prompts_are_taken_where_the_router_looks(wordy, tmp_path):
    path = tmp_path / "experts.yaml"
    path.write_text("experts:\n- positive_prompts: [w1 w2 w3, w4]\n  negative_prompts: [w9 w8]\n"
                    "- positive_prompts: [w50 w60]\n")  # fmt: skip
    rows = router_rows(open_checkpoint(wordy), "prompts", str(path), 2, [1])
    assert list(rows) == [1]

    def last(*ids):
        return observed(wordy, torch.tensor([ids]))[0][1][-1].double()

    first = (last(1, 2, 3) + last(4)) / 2 - last(9, 8)
    torch.testing.assert_close(rows[1][0], first / first.norm(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows[1][1], last(50, 60) / last(50, 60).norm(), rtol=1e-4, atol=1e-5)


def test_domains_go_to_their_experts(wordy, tmp_path):
    generator = torch.Generator().manual_seed(5)
    for d in range(2):
        words = torch.randint(1 + 90 * d, 90 + 90 * d, (300,), generator=generator).tolist()
        (tmp_path / f"{d}.txt").write_text(" ".join(f"w{i}" for i in words))
    (tmp_path / "d.yaml").write_text("domains: [0.txt, 1.txt]")
    surgery.upcycle(wordy, tmp_path / "out", experts=2, top_k=1, router=f"domains:{tmp_path / 'd.yaml'}",
                    verify_tokens=32)  # fmt: skip
    rows = open_checkpoint(tmp_path / "out").parts["layers.0.router"].full()
    for d in range(2):
        ids = torch.tensor([[int(w[1:]) for w in (tmp_path / f"{d}.txt").read_text().split()[:128]]])
        chosen = (observed(wordy, ids)[0][0] @ rows.T).argmax(1)
        assert float((chosen == d).float().mean()) > 0.7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("experts: 3", "no list of experts"),
        ("experts: [{positive_prompts: [a]}]", "lists 1 experts, and the router has 2"),
        ("experts: [{positive_prompts: [a]}, {positive: [b]}]", "needs a list of positive_prompts"),
        ("experts: [{positive_prompts: [a]}, {positive_prompts: []}]", "needs a list of positive_prompts"),
        ("{mode: guess, experts: [{positive_prompts: [a]}, {positive_prompts: [b]}]}", "mode 'guess'"),
        ("{modes: guess, experts: []}", "no field 'modes'"),
    ],
)
def test_bad_prompts(text, words, wordy, tmp_path):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        router_rows(open_checkpoint(wordy), "prompts", str(tmp_path / "p.yaml"), 2, [0])


def test_bad_texts(wordy, dense, tmp_path):
    (tmp_path / "empty").write_text("  ")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, words in (("empty", "is empty"), ("binary", "no UTF-8"), ("none", "cannot be read")):
        with pytest.raises(FileError, match=words):
            tokens_of(open_checkpoint(wordy), str(tmp_path / name), 32)
    (tmp_path / "good").write_text("w1 w2 w3")
    assert tokens_of(open_checkpoint(wordy), str(tmp_path / "good"), 4).tolist() == [[1, 2, 3, 1]]
    with pytest.raises(UsageError, match="no tokenizer"):
        tokens_of(open_checkpoint(dense), str(tmp_path / "good"), 4)
    with pytest.raises(UsageError, match="too few for 32 clusters"):
        upcycled(open_checkpoint(dense), Settings(32, 2, strategy="copy", router="kmeans", text_tokens=8))


def test_the_command(dense, tmp_path):
    words = ["upcycle", dense, tmp_path / "out", "--experts", "4", "--top-k", "2", "--strategy", "partition", "--order",
             "gradient", "--router", "kmeans", "--text-tokens", "64", "--force-lossy", "--json",
             "--verify-tokens", "32"]  # fmt: skip
    done = CliRunner().invoke(cli.main, [str(w) for w in words])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["proof"]["verdict"] == "not preserving, as asked"
