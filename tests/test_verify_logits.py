"""`surgery verify --logits`: the first diverging place and the cause of mistakes that are made here by hand."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from surgery.cli import main as cli
from surgery.cli import show_verification as render
from surgery.conversion.convert import convert
from surgery.errors import SurgeryError
from surgery.formats.registry import open_checkpoint
from surgery.formats.topology import Topology
from surgery.running import loading
from surgery.running import whole as running
from surgery.running.loading import load
from surgery.verification import logits
from surgery.verification.findings import Verified
from surgery.verification.logits import compare_logits
from surgery.verification.report import LogitReport
from surgery.verification.weights import Weights
from tests import tiny
from tests.test_verify import changed, check

Tensors = dict[str, torch.Tensor]
L, G, N, D = 6, 4, 3, 10


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def save(family: str) -> Path:
        if family not in made:
            made[family] = tiny.save(family, tmp_path_factory.mktemp("logits") / family)
        return made[family]

    return save


# ------------------------------------------------- mistakes, as plain tensor operations on Hugging Face's own names


def each(edit: Callable[[Tensors, str], None], layers: range | tuple[int, ...] = range(L)) -> Callable[[Tensors], None]:
    def weights(w: Tensors) -> None:
        for i in layers:
            edit(w, f"model.layers.{i}.")

    return weights


def apply(w: Tensors, name: str, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
    w[name] = fn(w[name]).reshape(w[name].shape).contiguous()


def interleave(w: Tensors, at: str, which: str = "qk") -> None:
    """As Meta's converter does it, backwards."""
    for s, heads in (("q", G * N), ("k", G)):
        if s in which:
            apply(w, f"{at}self_attn.{s}_proj.weight", lambda t, n=heads: t.view(n, 2, D // 2, -1).transpose(1, 2))


def across(w: Tensors, at: str) -> None:
    """Query head j belongs to key/value head j % G instead of j // N."""
    apply(w, at + "self_attn.q_proj.weight", lambda t: t.view(G, N, D, -1).transpose(0, 1))
    apply(w, at + "self_attn.o_proj.weight", lambda t: t.view(-1, G, N, D).transpose(1, 2))


def shuffle_kv(w: Tensors, at: str) -> None:
    for s in "kv":
        apply(w, f"{at}self_attn.{s}_proj.weight", lambda t: t.view(G, D, -1)[[1, 2, 3, 0]])


def exchange(one: str, other: str) -> Callable[[Tensors, str], None]:
    def edit(w: Tensors, at: str) -> None:
        w[at + one], w[at + other] = w[at + other], w[at + one]

    return edit


def noise(name: str) -> Callable[[Tensors], None]:
    return lambda w: w[name].add_(torch.randn(w[name].shape, generator=torch.Generator().manual_seed(1)))


def unweave(w: Tensors) -> None:
    """NeoX: query, key and value as three blocks instead of woven by head."""
    for i in range(L):
        for kind in ("weight", "bias"):
            apply(w, f"gpt_neox.layers.{i}.attention.query_key_value.{kind}",
                  lambda t: t.view(G * N, 3, D, -1).transpose(0, 1))  # fmt: skip


GATE_UP = exchange("mlp.gate_proj.weight", "mlp.up_proj.weight")
KEY_VALUE = exchange("self_attn.k_proj.weight", "self_attn.v_proj.weight")
TWO_NORMS = exchange("input_layernorm.weight", "post_attention_layernorm.weight")


def rope(**values: object) -> Callable[[dict], None]:
    return lambda c: c["rope_parameters"].update(values)


# family, weights, config, first place, (kind, cause) of each cause
Case = tuple[str, Callable[[Tensors], object] | None, Callable[[dict], object] | None, str, list[tuple[str, str]]]
ATTENTION_0, MLP_0, NORM_0 = "layer 0, attention", "layer 0, mlp", "layer 0, input_layernorm"
CASES: dict[str, Case] = {
    "rope base": ("llama", None, rope(rope_theta=5e5), ATTENTION_0, [("config", "rope base: 10000 and 500000")]),
    "rope scaling": ("llama", None, rope(rope_type="linear", factor=2.0), ATTENTION_0,
                     [("config", "rope scaling: none and linear")]),
    "rope fraction": ("gpt_neox", None, rope(partial_rotary_factor=0.8), ATTENTION_0,
                      [("config", "rope fraction: 0.4 and 0.8")]),
    "norm eps": ("qwen3", None, lambda c: c.update(rms_norm_eps=1e-3), NORM_0,
                 [("config", "norm eps: 1e-06 and 0.001")]),
    "activation": ("llama", None, lambda c: c.update(hidden_act="gelu"), MLP_0,
                   [("config", "activation: silu and gelu")]),
    "window": ("mistral", None, lambda c: c.update(sliding_window=None), ATTENTION_0, [("config", "sliding window")]),
    "clip": ("olmo", None, lambda c: c.update(clip_qkv=None), ATTENTION_0,
             [("config", "clip of q, k and v: 2 and none")]),
    "parallel": ("gpt_neox", None, lambda c: c.update(use_parallel_residual=False), "layer 0, post_attention_layernorm",
                 [("config", "parallel residual")]),
    "renormalised": ("qwen3_moe", None, lambda c: c.update(norm_topk_prob=False), "layer 1, mlp",
                     [("config", "renormalised experts' weights: True and False")]),
    "rotary layout": ("llama", each(interleave), None, ATTENTION_0,
                      [("layout", "rotary layout of q and k: pairs lie side by side")]),
    "rotary layout, one layer": ("llama", each(interleave, (2,)), None, "layer 2, attention",
                                 [("layout", "(layer 2)")]),
    "rotary layout of q": ("qwen3", each(lambda w, at: interleave(w, at, "q"), (1, 4)), None, "layer 1, attention",
                           [("layout", "rotary layout of q: ")]),
    "gqa order": ("llama", each(across), None, ATTENTION_0,
                  [("layout", "GQA order of q and o: query heads lie across")]),
    "gqa order of kv": ("mistral", each(shuffle_kv), None, ATTENTION_0,
                        [("layout", "GQA order: key/value heads of k: B has A's [1, 2, 3, 0]; key/value heads of v")]),
    "gate and up": ("llama", each(GATE_UP), None, MLP_0, [("layout", "gate and up are swapped (layers 0 to 5)")]),
    "k and v": ("llama", each(KEY_VALUE), None, ATTENTION_0, [("layout", "k and v are swapped")]),
    "norms": ("llama", each(TWO_NORMS), None, NORM_0, [("layout", "the two norms of a layer are swapped")]),
    "fused qkv": ("gpt_neox", unweave, None, ATTENTION_0,
                  [("layout", "taken as woven by head group out of a tensor of three blocks")]),
    "values": ("llama", noise("model.layers.3.mlp.down_proj.weight"), None, "layer 3, mlp",
               [("values", "values of layers.3.mlp.down")]),
    "values of an expert": ("mixtral", noise("model.layers.4.block_sparse_moe.experts.5.w2.weight"), None,
                            "layer 4, mlp",
                            [("values", "values of layers.4.experts.5.down")]),
    "values of the head": ("olmo2", noise("lm_head.weight"), None, "the head", [("values", "values of lm_head")]),
    "values of the embedding": ("llama", lambda w: w["model.embed_tokens.weight"].neg_(), None, "the embedding",
                                [("values", "values of embed")]),
    "two in the config": ("llama", None, lambda c: (c.update(rms_norm_eps=1e-3), rope(rope_theta=5e5)(c)), NORM_0,
                          [("config", "rope base"), ("config", "norm eps")]),
    "a layout and the config": ("llama", each(GATE_UP), rope(rope_theta=5e5), ATTENTION_0,
                                [("config", "rope base"), ("layout", "gate and up")]),
}  # fmt: skip


def told(report: LogitReport) -> str:
    json.dumps(report.to_json(), allow_nan=False)
    return "\n".join(c.text for c in report.causes)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_cause_is_named(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    family, weights, config, first, causes = CASES[name]
    report = compare_logits(saved(family), changed(saved(family), tmp_path / "b", weights, config))
    assert not report.same and report.first is not None and report.first.place == first, report
    found = sorted((c.kind, c.cause) for c in report.causes)
    assert len(found) == len(causes), told(report)
    for (kind, text), (want_kind, want) in zip(found, sorted(causes), strict=True):
        assert kind == want_kind and want in text, told(report)
    last = report.causes[-1]
    assert last.explains and last.after <= 1e-4 and last.before > last.after
    assert report.causes[0].before == report.max_diff


# ---------------------------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize(("family", "factor"), [("llama3", "8"), ("llama_tied", "32")])
def test_other_formats_give_equal_logits(
    family: str, factor: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    convert(saved(family), tmp_path / "meta", to="meta", topology=Topology(tp=2), options={"rope_factor": factor})
    assert compare_logits(saved(family), tmp_path / "meta", options={"rope_factor": factor}).bit_equal
    # a folder that says another factor is another model, and that is the cause which is found
    report = compare_logits(saved(family), tmp_path / "meta", options={"rope_factor": "5"})
    assert [c.cause for c in report.causes] == ["rope scaling factor: " + factor + " and 5"]


def test_rounding_is_a_cause(saved: Callable[[str], Path], tmp_path: Path) -> None:
    cast = changed(saved("llama"), tmp_path / "b", lambda w: w.update({k: t.bfloat16() for k, t in w.items()}))
    for pair, text in (
        ((saved("llama"), cast), "B's weights are A's"),
        ((cast, saved("llama")), "A's weights are B's"),
    ):
        report = compare_logits(*pair)
        assert [(c.kind, c.after) for c in report.causes] == [("rounding", 0.0)] and text in told(report)


def test_padding_inside_the_embedding(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Two ranks padded their halves of the vocabulary each, and were joined with the padding inside."""

    def weights(w: Tensors) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            zeros = torch.zeros(4, w[name].shape[1])
            w[name] = torch.cat([w[name][:132], zeros, w[name][132:], zeros])

    b = changed(saved("llama"), tmp_path / "b", weights, lambda c: c.update(vocab_size=272))
    report = compare_logits(saved("llama"), b)
    assert report.first is not None and report.first.module == "embed" and report.vocabulary == 264
    assert {c.cause for c in report.causes} == {
        f"padding: rows of zeros lie inside {name}, not behind it" for name in ("embed", "lm_head")
    }
    assert report.causes[-1].explains


def test_tied_heads(saved: Callable[[str], Path], tmp_path: Path) -> None:
    tied = saved("llama_tied")
    head = torch.randn(264, 120, generator=torch.Generator().manual_seed(0))
    untied = changed(tied, tmp_path / "b", lambda w: w.update({"lm_head.weight": head}),
                     lambda c: c.update(tie_word_embeddings=False))  # fmt: skip
    for pair in ((tied, untied), (untied, tied)):
        report = compare_logits(*pair)
        assert report.first is not None and report.first.module == "lm_head"
        assert len(report.causes) == 1 and report.causes[0].cause.startswith("tied head") and report.causes[0].explains


def test_nan(saved: Callable[[str], Path], tmp_path: Path) -> None:
    def weights(w: Tensors) -> None:
        w["model.layers.1.self_attn.v_proj.weight"][3, 3] = math.nan

    broken = changed(saved("llama"), tmp_path / "b", weights)
    report = compare_logits(saved("llama"), broken)
    assert "the logits of B are not all finite, first in layer 1, attention" in report.verdict
    assert "values of layers.1.attn.v" in told(report) and report.causes[0].explains
    with pytest.raises(SurgeryError, match="the logits of A are not all finite"):
        compare_logits(broken, saved("llama"))


def test_other_sizes_are_not_explained(saved: Callable[[str], Path], tmp_path: Path) -> None:
    report = compare_logits(saved("llama"), tiny.save("llama", tmp_path / "b", f=160))
    assert not report.same and report.causes == () and "ffn width" in report.notes[0]


def test_measures_against_a_plain_run(saved: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    b = changed(saved("llama"), tmp_path / "b", noise("model.layers.5.mlp.up_proj.weight"))
    report = compare_logits(saved("llama"), b)
    tokens = running.fixed_tokens(264)
    assert tokens.shape == report.tokens == (2, 32) and int(tokens.max()) < 264
    with torch.no_grad():
        x, y = (
            AutoModelForCausalLM.from_pretrained(p, attn_implementation="eager", dtype=torch.float32)(tokens).logits
            for p in (saved("llama"), b)
        )
    assert report.max_diff == pytest.approx(float((x - y).abs().max()), rel=1e-5)
    assert report.relative == pytest.approx(report.max_diff / float(x.std()), rel=1e-5)
    kl = (
        torch.nn.functional.kl_div(y.log_softmax(-1), x.log_softmax(-1), reduction="none", log_target=True)
        .sum(-1)
        .mean()
    )
    assert report.kl == pytest.approx(float(kl), rel=1e-3)
    assert report.agreement == pytest.approx(float((x.argmax(-1) == y.argmax(-1)).float().mean()), rel=1e-6)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_models_seen_as_parts(family: str, saved: Callable[[str], Path]) -> None:
    """What a loaded model holds are the checkpoint's parts; changing one changes just that, and is undone."""
    checkpoint, model = open_checkpoint(saved(family)), load(saved(family))
    weights = Weights(model, checkpoint.spec)
    assert set(weights.parts) == set(checkpoint.parts)
    assert all(torch.equal(p.full(), checkpoint.parts[n].full()) for n, p in weights.parts.items())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for name in ("layers.1.attn.k", next(n for n in weights.parts if n.startswith("layers.2.") and n.endswith("up"))):
        wanted = -weights.parts[name].full().clone()
        with weights.tried({name: wanted}):
            assert torch.equal(weights.parts[name].full(), wanted)
            other = sum(int((p != before[n]).sum()) for n, p in model.named_parameters())
            assert other == int((wanted != 0).sum())
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_forced_runs_isolate(saved: Callable[[str], Path]) -> None:
    model, tokens = load(saved("llama")), running.fixed_tokens(264)
    trace = running.run(model, tokens)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(1.5)
    free, forced = running.run(model, tokens), running.run(model, tokens, trace)
    assert min(running.gaps(trace.outputs, free.outputs)[n] for n in ("layers.3.mlp", "layers.5", "lm_head")) > 1e-3
    apart = {n for n, gap in running.gaps(trace.outputs, forced.outputs).items() if gap > 0}
    assert apart == {"layers.2.mlp", "layers.2"}


def test_too_large_for_the_memory(saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "free_memory", lambda: 1 << 20)
    with pytest.raises(SurgeryError, match=r"takes at least [\d.]+ MB of memory, 1.0 MB are allowed"):
        compare_logits(saved("llama"), saved("llama"))


def test_tight_memory_gives_the_same_answer(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two models do not fit, B is loaded again after experiments with its config."""
    monkeypatch.setattr(loading, "free_memory", lambda: 4 << 20)
    b = changed(saved("llama"), tmp_path / "b", each(GATE_UP), rope(rope_theta=5e5))
    assert [c.kind for c in compare_logits(saved("llama"), b).causes] in (["config", "layout"], ["layout", "config"])


def test_what_is_printed(saved: Callable[[str], Path], tmp_path: Path) -> None:
    b = changed(saved("llama"), tmp_path / "b", each(interleave))
    out = io.StringIO()
    answer = Verified(check(saved("llama"), b), compare_logits(saved("llama"), b))
    render.show(answer, Console(file=out, width=300))
    text = out.getvalue()
    assert "first in layer 0, attention" in text and "attention of layers 0 to 5" in text
    assert "cause: rotary layout of q and k: pairs lie side by side, as Meta stores them (layers 0 to 5)" in text
    done = CliRunner().invoke(cli.main, ["verify", str(saved("llama")), str(b), "--logits", "--json"])
    data = json.loads(done.output)
    assert done.exit_code == 1 and data["logits"]["causes"][0]["kind"] == "layout"
    same = CliRunner().invoke(cli.main, ["verify", str(b), str(b), "--logits"])
    assert same.exit_code == 0 and "the logits are equal, bit for bit" in same.output
