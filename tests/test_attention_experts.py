"""Attention experts: a folder that runs by itself, equal to the dense model where every group of heads is chosen."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from surgery.cli import main as cli
from surgery.errors import ConfigError, UsageError
from surgery.formats.registry import open_checkpoint
from surgery.upcycling import run
from surgery.upcycling.attention import plan as attention_run
from surgery.upcycling.attention.experts import Attention, modeling, open_attention
from surgery.upcycling.dense_to_moe.settings import Settings
from surgery.upcycling.request import Proven
from tests import oracle, reference, tiny

IDS = torch.randint(3, tiny.SIZES["v"], (2, 24), generator=torch.Generator().manual_seed(3))
SMALL = {"l": 2}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    names = {"llama": {}, "llama3": {}, "llama_tied": {}, "qwen2": {}}
    return {name: tiny.save(name, folder / name, **SMALL, **more) for name, more in names.items()}


@pytest.fixture(autouse=True)
def modules_of_models(tmp_path, monkeypatch):
    """transformers copies the code of models into a folder of its own: one of this test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


def make(src, dst, *words):
    flat = [str(w) for w in ("upcycle", src, dst, "--verify-tokens", 32, *words)]
    done = CliRunner().invoke(cli.main, flat)
    assert done.exit_code == 0, done.output
    return done.output


def loaded(folder):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def logits(model, ids=IDS, **more):
    with torch.no_grad():
        return model(ids, **more).logits.float()


@pytest.mark.parametrize("family", ["llama", "llama3", "llama_tied", "qwen2"])
@pytest.mark.parametrize("experts", [2, 4])
def test_with_all_groups_it_is_the_dense_model(family, experts, dense, tmp_path):
    text = make(dense[family], tmp_path / "out", "--attention-experts", experts)
    assert "proof  exact" in text
    model = loaded(tmp_path / "out")
    assert (logits(model) - oracle.hf_logits(dense[family], IDS)).abs().max() < 1e-4
    assert type(model).__module__.startswith("transformers_modules")
    record = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert record["upcycling"]["attention_experts"] == experts
    assert record["verified"]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (family in ("llama_tied", "qwen2"))


def test_with_experts_in_the_mlp_too(dense, tmp_path):
    make(dense["llama"], tmp_path / "out", "--attention-experts", 4, "--experts", 8, "--top-k", 4)
    assert (logits(loaded(tmp_path / "out")) - oracle.hf_logits(dense["llama"], IDS)).abs().max() < 1e-4


class Naive(reference._Model):
    """The plain transformer, with attention run group by group for the tokens that chose it."""

    groups, top_k, scale = 4, 2, 8**0.5

    def attention(self, i, x):
        s, at = self.spec, f"layers.{i}.attn."
        chosen = (x @ self.w[at + "router"].T).topk(self.top_k, -1)
        share = F.softmax(chosen.values, -1) * self.scale
        heads, width = s.heads // self.groups, s.head_dim
        q, k, v = (self.linear(x, at + name).unflatten(-1, (-1, width)) for name in "qkv")
        cos, sin = reference.angles(s.rope, width, x.shape[1])
        q, k = (reference.turn(t.transpose(1, 2), cos, sin).transpose(1, 2) for t in (q, k))
        out = torch.zeros_like(x)
        for b in range(x.shape[0]):
            for t in range(x.shape[1]):
                for group, weight in zip(chosen.indices[b, t].tolist(), share[b, t], strict=True):
                    for head in range(group * heads, (group + 1) * heads):
                        scores = k[b, : t + 1, head // s.group] @ q[b, t, head] / width**0.5
                        y = scores.softmax(0) @ v[b, : t + 1, head // s.group]
                        out[b, t] += weight * (self.w[at + "o"][:, head * width : (head + 1) * width] @ y)
        return out


def test_fewer_groups_against_a_plain_loop(dense, tmp_path):
    """Token by token, head by head."""
    out = tmp_path / "out"
    text = make(dense["llama"], out, "--attention-experts", 4, "--attention-top-k", 2, "--force-lossy")
    assert "not preserving, as asked" in text
    made = open_attention(out, {})
    ids = IDS[:, :9]
    want = Naive(made.spec, {n: p.full().float() for n, p in made.parts.items()}).run(ids)
    assert (logits(loaded(out), ids) - want).abs().max() < 1e-4
    assert (want - oracle.hf_logits(dense["llama"], ids)).abs().max() > 1e-2


def test_padding_caching_and_training(dense, tmp_path):
    out = tmp_path / "out"
    make(dense["llama"], out, "--attention-experts", 4, "--attention-top-k", 2, "--force-lossy", "--experts", 4,
         "--top-k", 2, "--strategy", "copy")  # fmt: skip
    model = loaded(out)
    whole = logits(model)
    with torch.no_grad():
        first = model(IDS[:, :10], use_cache=True)
        second = model(IDS[:, 10:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=1e-4, atol=1e-4)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
    mask = torch.cat([torch.zeros(2, 3), torch.ones(2, 24)], 1).long()
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    shifted = logits(model, padded, attention_mask=mask, position_ids=places)[:, 3:]
    torch.testing.assert_close(shifted, whole, rtol=1e-4, atol=1e-4)
    written = model.generate(IDS[:1, :5], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    by_hand = IDS[:1, :5]
    for _ in range(6):
        by_hand = torch.cat([by_hand, logits(model, by_hand)[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, by_hand)
    loss = model.train()(IDS, labels=IDS).loss
    loss.backward()
    want = F.cross_entropy(whole[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert float(loss.detach()) == pytest.approx(float(want), rel=1e-4)
    routers = [p for n, p in model.named_parameters() if n.endswith("self_attn.router.weight")]
    assert len(routers) == 2
    assert all(float(p.grad.abs().max()) > 0 for p in routers)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again")), logits(model.eval()))


def test_the_folder_needs_nothing_of_ours(dense, tmp_path):
    """Loaded by a program that cannot import surgery."""
    out = tmp_path / "out"
    make(dense["llama"], out, "--attention-experts", 2)
    assert (out / "modeling_attention_moe.py").read_bytes() == modeling()
    script = f"""
import sys
sys.modules["surgery"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)
print(model.config.num_attention_experts, type(model).__name__)
"""
    alone = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=alone)
    assert done.stdout.strip() == "2 AttentionMoeForCausalLM", done.stderr
    with pytest.raises(ConfigError, match="model_type is 'attention_moe'") as refused:  # and we run no code of a folder
        open_checkpoint(out, format="hf")
    assert "the model that it was made of" in str(refused.value)


def test_the_weights_are_the_sources_bits(dense, tmp_path):
    from safetensors.torch import load_file

    make(dense["llama"], tmp_path / "out", "--attention-experts", 4)
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "out", dense["llama"]))
    assert all(oracle.same_bits(ours[k], theirs[k]) for k in theirs)
    assert ours.keys() - theirs.keys() == {f"model.layers.{i}.self_attn.router.weight" for i in range(2)}


def test_seeds(dense, tmp_path):
    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        ready = attention_run.prepare(
            dense["llama"], Attention(4, 2, seed=seed), Proven(verify_tokens=0), force_lossy=True
        )
        digests.append(run.carry_out(ready, tmp_path / name).report.content_digest)
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("family", "wanted", "settings", "words"),
    [
        ("llama", Attention(3, 3), None, "do not divide 4"),
        ("llama", Attention(4, 5), None, "choose fewer"),
        ("llama", Attention(4, 2), None, "another function"),
        ("llama", Attention(4, 4), Settings(4, 2, target="qwen2_moe"), "do not go together"),
        ("qwen3", Attention(4, 4), None, "differs in qk_norm"),
        ("olmo2", Attention(4, 4), None, "norm_at"),
        ("mistral", Attention(4, 4), None, "windows"),
    ],
)
def test_refusals(family, wanted, settings, words, tiny_hf):
    with pytest.raises((UsageError, ConfigError), match=words):
        attention_run.prepare(tiny_hf(family), wanted, Proven(), settings)


def test_bad_configs(dense, tmp_path):
    make(dense["llama"], tmp_path / "out", "--attention-experts", 4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for key, value, words in (
        ("num_attention_experts", "4", "num_attention_experts is '4'"),
        ("model_type", "llama", "no model with attention experts"),
        ("rotary_base", None, "rope"),
    ):
        shutil.copytree(tmp_path / "out", tmp_path / key)
        (tmp_path / key / "config.json").write_text(json.dumps({**config, key: value}))
        if key == "rotary_base":
            assert open_attention(tmp_path / key, {}).spec.rope.base == 10000  # as the modeling file takes it
            continue
        with pytest.raises(ConfigError, match=words):
            open_attention(tmp_path / key, {})
