"""`surgery upcycle --collapse`: exact where it can be, with the source's bits; refused or told where it cannot."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

import surgery
from surgery.cli import main as cli
from surgery.errors import ConfigError, UsageError
from surgery.formats.registry import open_checkpoint
from surgery.formats.topology import Topology
from surgery.model.spec import Rope
from surgery.upcycling import run as running
from surgery.upcycling.collapse import collapsed, router_shares
from surgery.upcycling.request import Collapse
from tests import oracle, reference, tiny

IDS = torch.randint(0, tiny.SIZES["v"], (2, 24), generator=torch.Generator().manual_seed(3))


def collapse(src, dst, by="exact", force_lossy=False, verify_tokens=32):
    request = Collapse(by=by, force_lossy=force_lossy, verify_tokens=verify_tokens)
    return running.carry_out(running.prepare_collapse(src, request), dst)


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


SMALL = {"l": 2}
EXACT = {
    "copy": {"experts": 4, "top_k": 2, "strategy": "copy"},
    "virtual-group": {"experts": 8, "top_k": 4, "granularity": 4},
    "up-down": {"experts": 8, "top_k": 4, "granularity": 4, "scale": "up-down"},
    "router": {"experts": 8, "top_k": 2, "target": "glm4_moe", "scale": "router"},
    "shared half": {"experts": 4, "top_k": 2, "strategy": "copy", "shared": "0.5"},
    "gated shared half": {"experts": 4, "top_k": 2, "granularity": 2, "shared": "0.5", "target": "qwen2_moe"},
    "whole shared": {"experts": 4, "top_k": 2, "strategy": "copy", "shared": "dense"},
    "idle shared": {"experts": 4, "top_k": 2, "strategy": "copy", "target": "qwen2_moe"},
    "dense layers": {"experts": 4, "top_k": 2, "target": "qwen2_moe", "dense_layers": (0,)},
    "partition": {"experts": 4, "top_k": 4, "strategy": "partition", "router": "zeros"},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Two small dense models, the second with tied embeddings and in bf16."""
    folder = tmp_path_factory.mktemp("dense")
    return {
        "llama": tiny.save("llama", folder / "llama", **SMALL),
        "tied": tiny.save("llama_tied", folder / "tied", "bfloat16", **SMALL),
    }


@pytest.mark.parametrize("which", ["llama", "tied"])
@pytest.mark.parametrize("case", EXACT)
def test_the_way_back_gives_the_sources_bits(case, which, dense, tmp_path):
    surgery.upcycle(dense[which], tmp_path / "moe", verify_tokens=0, **EXACT[case])
    done = collapse(tmp_path / "moe", tmp_path / "back", verify_tokens=32)
    assert done.proof.verdict == "exact"
    ours, theirs = weights(tmp_path / "back"), weights(dense[which])
    assert ours.keys() == theirs.keys()
    assert all(oracle.same_bits(ours[k], theirs[k]) for k in theirs)
    assert open_checkpoint(tmp_path / "back").spec.differences(open_checkpoint(dense[which]).spec) == {}


def test_through_another_format_and_with_the_groups_torn_apart(dense, tmp_path):
    """The experts of a group need not stand side by side."""
    surgery.upcycle(dense["llama"], tmp_path / "moe", experts=8, top_k=4, granularity=2, verify_tokens=0)
    surgery.experts(tmp_path / "moe", tmp_path / "torn", permute="0,2,4,6,1,3,5,7", to="megatron-dist",
                    topology=Topology(ep=2), verify_tokens=0)  # fmt: skip
    collapse(tmp_path / "torn", tmp_path / "back", verify_tokens=32)
    for name, tensor in weights(dense["llama"]).items():  # Megatron pads the vocabulary
        assert oracle.same_bits(weights(tmp_path / "back")[name][: len(tensor)], tensor), name


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"experts": 4, "top_k": 2, "strategy": "drop", "force_lossy": True}, "no copies"),
        ({"experts": 4, "top_k": 2, "strategy": "partition", "force_lossy": True}, "no copies"),
        ({"experts": 8, "top_k": 3, "strategy": "virtual-group", "granularity": 2, "force_lossy": True}, "no whole"),
        (
            {
                "experts": 4,
                "top_k": 2,
                "strategy": "copy",
                "normalise": False,
                "target": "qwen2_moe",
                "force_lossy": True,
            },
            "do not sum to a constant",
        ),
    ],
)
def test_what_is_not_exact_is_refused(wanted, words, dense, tmp_path):
    surgery.upcycle(dense["llama"], tmp_path / "moe", verify_tokens=0, **wanted)
    with pytest.raises(UsageError, match=words) as error:
        collapse(tmp_path / "moe", tmp_path / "back")
    assert "--force-lossy" in str(error.value)
    with pytest.raises(UsageError, match=words):
        collapse(tmp_path / "moe", tmp_path / "back", by="average")
    done = collapse(tmp_path / "moe", tmp_path / "back", by="average", force_lossy=True, verify_tokens=32)
    assert done.proof.verdict == "not preserving, as asked"
    assert not json.loads((tmp_path / "back" / "surgery.json").read_text())["upcycling"]["exact"]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "glm4_moe"])
@pytest.mark.parametrize("by", ["average", "by-router"])
def test_means_against_a_plain_loop(by, family, tiny_hf):
    source = open_checkpoint(tiny_hf(family))
    if family == "glm4_moe":  # half of a head turns there, which no dense family of Hugging Face does
        with pytest.raises(ConfigError, match="no Hugging Face family holds this"):
            collapsed(source, by, force_lossy=True, tokens=64)
        source = replace(source, spec=source.spec.replace(rope=Rope(1e4)))
    made = collapsed(source, by, force_lossy=True, tokens=64)
    shares = router_shares(source, 64) if by == "by-router" else {}
    spec = source.spec
    for i in range(spec.layers):
        if not spec.is_moe(i):
            continue
        total = (spec.router_scale or 1.0) * (1 if spec.top_k_renormalised else spec.top_k / spec.experts)
        share, total = shares.get(i, ([1 / spec.experts] * spec.experts, total))
        assert sum(share) == pytest.approx(1)
        for which, factor in (("gate", 1), ("up", 1), ("down", total)):
            want = sum(w * source.parts[f"layers.{i}.experts.{e}.{which}"].full().double() for e, w in enumerate(share))
            got = made.checkpoint.parts[f"layers.{i}.mlp.{which}"].full().double()
            dim = 1 if which == "down" else 0
            got = got.narrow(dim, spec.shared_ffn, spec.expert_ffn)  # behind the shared expert, in front of the padding
            torch.testing.assert_close(got, want * factor, rtol=1e-5, atol=1e-6)
            if spec.shared_ffn:
                shared = source.parts[f"layers.{i}.shared.{which}"].full().double()
                gated = 0.5 if spec.shared_gate and which == "down" else 1.0
                begin = made.checkpoint.parts[f"layers.{i}.mlp.{which}"].full().double().narrow(dim, 0, spec.shared_ffn)
                torch.testing.assert_close(begin, shared * gated)
    assert reference.logits(made.checkpoint, IDS).isfinite().all()


def test_the_routers_shares_are_those_of_the_reference(tiny_hf):
    """The plain transformer, with its feed-forward observed, gives the same shares."""
    from surgery.running.tokens import prose_tokens

    source = open_checkpoint(tiny_hf("mixtral"))
    ids, _ = prose_tokens(source, 64)
    seen = {}

    class Watching(reference._Model):
        def feed(self, i, x):
            chances = (x @ self.w[f"layers.{i}.router"].T).softmax(-1)
            best = chances.topk(self.spec.top_k, -1)
            weight = best.values / best.values.sum(-1, keepdim=True)
            seen[i] = torch.zeros_like(chances).scatter(-1, best.indices, weight).flatten(0, 1).mean(0)
            return super().feed(i, x)

    Watching(source.spec, {n: p.full().float() for n, p in source.parts.items()}).run(ids)
    with pytest.raises(UsageError, match=r"running 64 tokens takes at least [\d.]+ MB of memory"):
        router_shares(source, 64, memory=1 << 20)
    for layer, (shares, total) in router_shares(source, 64, memory=6 << 20).items():
        assert total == pytest.approx(1)
        torch.testing.assert_close(torch.tensor(shares), seen[layer], rtol=1e-3, atol=1e-4)


def test_a_dense_model_is_refused(dense, tmp_path):
    with pytest.raises(ConfigError, match="is dense"):
        collapse(dense["llama"], tmp_path / "out")


def test_the_command(dense, tmp_path):
    surgery.upcycle(dense["llama"], tmp_path / "moe", experts=4, top_k=2, verify_tokens=0)

    def run(*words):
        return CliRunner().invoke(cli.main, ["upcycle", str(tmp_path / "moe"), *map(str, words), "--collapse"])

    planned = json.loads(run(tmp_path / "back", "--dry-run", "--json").output)
    assert planned["upcycling"]["layers"] == {"2 shards": 2}
    done = run(tmp_path / "back", "--verify-tokens", "32", "--to", "meta", "--tp", "2")
    assert done.exit_code == 0, done.output
    assert "proof  exact" in done.output
    assert open_checkpoint(tmp_path / "back").format == "meta"
