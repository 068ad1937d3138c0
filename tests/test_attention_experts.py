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

import surgery
from surgery.cli import main as cli
from surgery.errors import ConfigError, UsageError
from surgery.formats.hf.files import code_of
from surgery.formats.registry import open_checkpoint
from surgery.running.chat import answer
from surgery.upcycling import run
from surgery.upcycling.request import Upcycle
from surgery.verification.logits import compare_logits
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
    text = make(dense["llama"], tmp_path / "out", "--attention-experts", 4, "--experts", 8, "--top-k", 4)
    assert "choices tie" not in text  # the modelling file does not tell them
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
    made = open_checkpoint(out)
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


@pytest.mark.slow
def test_the_folder_needs_nothing_of_ours(dense, tmp_path):
    """Loaded by a program that cannot import surgery."""
    out = tmp_path / "out"
    make(dense["llama"], out, "--attention-experts", 2)
    assert (out / "modeling_attention_moe.py").read_bytes() == code_of("modeling_attention_moe.py")
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


def test_the_weights_are_the_sources_bits(dense, tmp_path):
    from safetensors.torch import load_file

    make(dense["llama"], tmp_path / "out", "--attention-experts", 4)
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "out", dense["llama"]))
    assert all(oracle.same_bits(ours[k], theirs[k]) for k in theirs)
    assert ours.keys() - theirs.keys() == {f"model.layers.{i}.self_attn.router.weight" for i in range(2)}


def test_seeds(dense, tmp_path):
    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        done = surgery.upcycle(dense["llama"], tmp_path / name, attention_experts=4, attention_top_k=2, seed=seed,
                               force_lossy=True, verify_tokens=0)  # fmt: skip
        digests.append(done.report.content_digest)
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("family", "wanted", "words"),
    [
        ("llama", {"attention_experts": 3}, "do not divide 4"),
        ("llama", {"attention_experts": 4, "attention_top_k": 5}, "choose fewer"),
        ("llama", {"attention_experts": 4, "attention_top_k": 2}, "another function"),
        ("llama", {"attention_experts": 4, "experts": 4, "top_k": 2, "target": "qwen2_moe"}, "do not go together"),
        ("llama", {"attention_experts": 4, "to": "megatron"}, "cannot hold this attention_moe"),
        ("qwen3", {"attention_experts": 4}, "query and key norms"),
        ("olmo2", {"attention_experts": 4}, "place of the norms"),
        ("mistral", {"attention_experts": 4}, "sliding window"),
    ],
)
def test_refusals(family, wanted, words, tiny_hf):
    with pytest.raises((UsageError, ConfigError), match=words):
        run.prepare(tiny_hf(family), Upcycle(**wanted))


@pytest.fixture(scope="module")
def made(dense, tmp_path_factory):
    """Two of four groups, and experts in the mlp."""
    folder = tmp_path_factory.mktemp("made") / "out"
    surgery.upcycle(dense["llama3"], folder, attention_experts=4, attention_top_k=2, experts=4, top_k=2,
                    strategy="copy", force_lossy=True, verify_tokens=0)  # fmt: skip
    return folder


def test_the_folder_is_read_like_any_other(made, tmp_path):
    found = open_checkpoint(made)
    spec = found.spec
    assert (spec.family, spec.attn_experts, spec.attn_top_k, spec.experts) == ("attention_moe", 4, 2, 4)
    assert spec.attn_scale == 8**0.5
    assert spec.parameters() == sum(p.numel() for p in loaded(made).parameters())
    text = CliRunner().invoke(cli.main, ["inspect", str(made)]).output
    assert "groups of attention heads" in text
    assert not found.notes
    surgery.convert(made, tmp_path / "again", to="hf")
    assert surgery.verify(made, tmp_path / "again").verdict == "the same model"
    assert (tmp_path / "again" / "config.json").read_bytes() == (made / "config.json").read_bytes()
    assert (tmp_path / "again" / "modeling_attention_moe.py").read_bytes() == code_of("modeling_attention_moe.py")


def test_logits_are_verified_and_the_cause_of_a_difference_is_named(made, tmp_path):
    shutil.copytree(made, tmp_path / "other")
    config = json.loads((made / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "attention_scale": 1.0}))
    assert compare_logits(made, made).bit_equal
    report = compare_logits(made, tmp_path / "other")
    assert not report.same
    assert any("scale of the groups' weights" in cause.text and cause.explains for cause in report.causes)
    assert "scale of the groups' weights" in surgery.verify(made, tmp_path / "other").verdict


def test_it_answers(made, tmp_path):
    """By our own code, whatever lies in the folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(made, tmp_path / "talks")
    with pytest.raises(ConfigError, match="tokenizer"):
        answer(made, "who")
    words = Tokenizer(models.WordLevel({"who": 0, "are": 1, "you": 2}, unk_token="who"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="who").save_pretrained(tmp_path / "talks")
    (tmp_path / "talks" / "modeling_attention_moe.py").write_text("raise SystemExit('run')")
    ids = torch.tensor([[0, 1]])
    for _ in range(3):
        ids = torch.cat([ids, logits(loaded(made), ids)[:, -1:].argmax(-1)], 1)
    said = " ".join({0: "who", 1: "are", 2: "you"}.get(i, "") for i in ids[0, 2:].tolist()).split()
    assert answer(tmp_path / "talks", "who are", 3).split() == said


def test_no_other_format_holds_it(made, tmp_path):
    for to in ("meta", "olmo", "olmo-core", "megatron", "megatron-dist", "neox"):
        with pytest.raises(ConfigError, match=r"groups of attention heads: 4|cannot hold"):
            surgery.convert(made, tmp_path / to, to=to)
    assert not list(tmp_path.iterdir())


def test_the_experts_of_its_mlp_are_edited_and_collapse(made, dense, tmp_path):
    surgery.experts(made, tmp_path / "twice", duplicate=2)
    assert (
        open_checkpoint(tmp_path / "twice").spec.experts,
        open_checkpoint(tmp_path / "twice").spec.attn_experts,
    ) == (8, 4)
    assert surgery.collapse(made, tmp_path / "back").proof.verdict == "exact"
    back = open_checkpoint(tmp_path / "back").spec
    assert (back.family, back.experts, back.ffn) == ("attention_moe", 0, open_checkpoint(dense["llama3"]).spec.ffn)


def test_code_that_is_not_ours_is_named_and_never_run(made, tmp_path):
    for name, text in (("other", "raise SystemExit('run')\n"), ("none", None)):
        shutil.copytree(made, tmp_path / name)
        file = tmp_path / name / "modeling_attention_moe.py"
        file.write_text(text) if text else file.unlink()
        (note,) = open_checkpoint(tmp_path / name).notes
        assert ("may compute something else" in note) == (text is not None)
        assert compare_logits(made, tmp_path / name).bit_equal


def test_bad_configs(made, tmp_path):
    config = json.loads((made / "config.json").read_text())
    for number, (changes, words) in enumerate((
        ({"num_attention_experts": "4"}, "num_attention_experts is '4'"),
        ({"num_attention_experts": 0}, "num_attention_experts is 0"),
        ({"attention_scale": -1}, "attention_scale is -1"),
        ({"num_local_experts": -1}, "num_local_experts is -1"),
        ({"model_type": "llama"}, "auto_map"),
        ({"rotary_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
    )):  # fmt: skip
        folder = tmp_path / str(number)
        shutil.copytree(made, folder)
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ConfigError, match=words):
            open_checkpoint(folder)
    plain = tmp_path / "plain"
    shutil.copytree(made, plain)
    (plain / "config.json").write_text(json.dumps({**config, "rotary_base": None}))
    assert open_checkpoint(plain).spec.rope.base == 10000  # as the modelling file takes it
