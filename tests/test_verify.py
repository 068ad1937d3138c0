"""`surgery verify`: every kind of difference between two checkpoints is found, measured right, and named."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file, save_file

from surgery.cli import main as cli
from surgery.cli import show_verification as render
from surgery.conversion.convert import convert
from surgery.formats.base import Checkpoint
from surgery.formats.registry import lenient, open_checkpoint
from surgery.formats.topology import Topology
from surgery.model.spec import Rope, Spec
from surgery.tensors.files import IO
from surgery.tensors.lazy import Fill, boxes
from surgery.verification import Comparison, compare
from surgery.verification.configs import spec_fields
from surgery.verification.findings import Verified
from surgery.verification.report import LogitReport
from surgery.verification.values import Tally
from tests import tiny

MEMORY = 1 << 20
DOWN = "model.layers.3.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("verify") / "llama")


def changed(
    source: Path,
    target: Path,
    weights: Callable[[dict[str, torch.Tensor]], object] | None = None,
    config: Callable[[dict], object] | None = None,
) -> Path:
    """A copy of a folder with other tensors and another config."""
    shutil.copytree(source, target)
    if weights:
        tensors = load_file(target / "model.safetensors")
        weights(tensors)
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
    if config:
        keys = json.loads((target / "config.json").read_text())
        config(keys)
        (target / "config.json").write_text(json.dumps(keys))
    return target


def check(a: Path | Checkpoint, b: Path | Checkpoint, memory: int = MEMORY) -> Comparison:
    opened = [open_checkpoint(x, options=lenient(x, None)) if isinstance(x, Path) else x for x in (a, b)]
    result = compare(*opened, max_memory=memory)
    json.dumps(result.to_json(), allow_nan=False)
    return result


def printed(result: Comparison) -> str:
    out = io.StringIO()
    render.show(Verified(result), Console(file=out, width=200))
    return out.getvalue()


# ------------------------------------------------------------------------------------------------------ the same model


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_equals_itself(family: str, tmp_path: Path) -> None:
    one, two = tiny.save(family, tmp_path / "a"), tiny.save(family, tmp_path / "b")
    result = check(one, two)
    assert (result.same, result.verdict, result.parts, result.fields) == (True, "the same model", (), ())
    assert result.a.digest == result.b.digest
    # and the digest is not a constant
    tensors = load_file(two / "model.safetensors")
    tensors[max(tensors)].view(-1)[-1] += 1
    save_file(tensors, two / "model.safetensors")
    again = check(one, two)
    assert again.a.digest == result.a.digest != again.b.digest
    assert not again.same and len(again.parts) == 1


def test_other_formats_and_ranks(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "meta", to="meta", topology=Topology(tp=2))
    result = check(llama, tmp_path / "meta")
    assert result.same and result.a.digest == result.b.digest and result.b.format == "meta"
    assert [f.name for f in result.fields] == ["context"]  # params.json cannot say it
    edited = changed(llama, tmp_path / "edited", lambda w: w[DOWN][5].neg_())
    assert [p.name for p in check(edited, tmp_path / "meta").parts] == ["layers.3.mlp.down"]


def test_each_byte_is_read_once(llama: Path) -> None:
    opened = [open_checkpoint(llama) for _ in range(2)]
    before, seen = IO["bytes"], []
    compare(*opened, max_memory=MEMORY, progress=seen.append)
    weights = sum(p.nbytes for c in opened for p in c.parts.values())
    assert IO["bytes"] - before == weights == sum(seen)
    assert max(seen) <= MEMORY // 16  # both sides of two blocks, within an eighth


# ------------------------------------------------------------------------------------------------------------- values


def test_one_value(llama: Path, tmp_path: Path) -> None:
    def edit(w: dict[str, torch.Tensor]) -> None:
        w[DOWN][5, 7] = 3.0

    result = check(llama, changed(llama, tmp_path / "b", edit))
    (part,) = result.parts
    was = float(load_file(llama / "model.safetensors")[DOWN][5, 7])
    assert (part.name, part.values.differing, part.values.first) == ("layers.3.mlp.down", 1, (5, 7))
    assert part.values.max_abs == pytest.approx(3.0 - was, rel=1e-7)
    assert (part.values.first_a, part.values.first_b) == (was, 3.0)
    assert result.verdict == "different: 1 part" and not result.same
    assert "layers.3.mlp.down: 1 of 17280 differ by up to" in printed(result)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "float64", "int64", "uint8", "float8_e4m3fn"])
def test_values_against_numpy(kind: str) -> None:
    """Counts, distances and places are those of a direct computation, however the tensor is cut into blocks."""
    rng = np.random.default_rng(3)
    dtype = getattr(torch, kind)
    a = torch.from_numpy(rng.integers(1, 100, (7, 11, 13))).to(dtype)
    b = a.clone()
    hit = np.sort(rng.choice(a.numel(), 9, replace=False))
    flat = b.view(torch.uint8).reshape(a.numel(), -1) if kind.startswith("float8") else b.view(-1)
    for i in hit:
        flat[i] = flat[i] + 3
    x, y = a.double().numpy().ravel(), b.double().numpy().ravel()
    for limit in (1, 17, 400, 1 << 20):
        tally = Tally(kind, kind)
        for box in boxes(a.shape, 1, limit):
            part = tuple(slice(p, q) for p, q in box)
            tally.add(a[part], b[part], box)
        found = tally.values()
        assert found is not None
        assert (found.elements, found.differing) == (a.numel(), int((x != y).sum()))
        assert found.max_abs == np.abs(x - y).max()
        assert found.max_rel == pytest.approx((np.abs(x - y) / np.maximum(np.abs(x), np.abs(y)))[hit].max(), rel=1e-12)
        assert found.first == tuple(map(int, np.unravel_index(hit[0], a.shape)))
        assert (found.first_a, found.first_b) == (x[hit[0]], y[hit[0]])


def test_nan_infinity_and_signs_of_zero() -> None:
    a = torch.tensor([1.0, float("nan"), 0.0, 2.0, float("inf"), float("nan")])
    b = torch.tensor([1.0, float("nan"), -0.0, float("nan"), -float("inf"), 7.0])
    tally = Tally("float32", "float32")
    tally.add(a, b, ((0, 6),))
    found = tally.values()
    assert found is not None and (found.differing, found.nonfinite, found.first, found.max_abs) == (4, 3, (2,), 0.0)
    json.dumps([found.first_a, found.first_b], allow_nan=False)
    tally = Tally("float32", "float32")
    tally.add(a[:3], b[:3], ((0, 3),))
    assert "only in the sign of zero" in tally.values().text
    tally = Tally("float32", "float32")
    tally.add(a, a.clone(), ((0, 6),))
    assert tally.values() is None  # a NaN equals itself


# ------------------------------------------------------------------------------------------------------------- dtypes


def test_a_wider_dtype_of_the_same_values(tmp_path: Path) -> None:
    narrow = tiny.save("llama", tmp_path / "a", "bfloat16")
    wide = changed(narrow, tmp_path / "b", lambda w: w.update({k: t.float() for k, t in w.items()}))
    result = check(narrow, wide)
    assert result.same_weights and not result.same
    assert result.verdict == "same weights, different dtype: bfloat16 and float32"
    assert all(p.kinds == ("bfloat16", "float32") and p.values is None for p in result.parts)
    assert "all values are equal" in result.parts[0].text


def test_rounding_is_told_from_damage(llama: Path, tmp_path: Path) -> None:
    cast = changed(llama, tmp_path / "b", lambda w: w.update({k: t.bfloat16() for k, t in w.items()}))
    for pair in ((llama, cast), (cast, llama)):
        result = check(*pair)
        assert result.verdict.startswith("the same weights but for rounding") and not result.same
        assert all(p.values.rounded for p in result.parts if p.values)
    damaged = changed(cast, tmp_path / "c", lambda w: w[DOWN][0].mul_(1.02))
    result = check(llama, damaged)
    assert result.verdict.startswith("different")
    assert [p.name for p in result.parts if p.values and not p.values.rounded] == ["layers.3.mlp.down"]


# --------------------------------------------------------------------------------------------------- shapes and names


def test_missing_parts_and_shapes(llama: Path) -> None:
    whole = open_checkpoint(llama)
    less = replace(whole, parts={k: p for k, p in whole.parts.items() if k != "layers.2.attn.k"})
    for pair, side in (((whole, less), "b"), ((less, whole), "a")):
        (part,) = check(*pair).parts
        assert (part.name, part.missing, part.text) == (
            "layers.2.attn.k",
            side,
            f"layers.2.attn.k: missing in {side.upper()}",
        )
    parts = {**whole.parts, "layers.1.mlp.up": Fill((144, 119), "float32")}
    (part,) = check(whole, replace(whole, parts=parts)).parts
    assert part.shapes == ((144, 120), (144, 119)) and part.changes and part.values is None


def test_padding_of_the_vocabulary(llama: Path, tmp_path: Path) -> None:
    def pad(value: float, rows: int = 24) -> Path:
        def weights(w: dict[str, torch.Tensor]) -> None:
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                w[name] = torch.cat([w[name], torch.full((rows, 120), value)])

        return changed(llama, tmp_path / f"{value}", weights, lambda c: c.update(vocab_size=264 + rows))

    zeros, junk = pad(0.0), pad(0.5)
    for pair, side in (((llama, zeros), "b"), ((zeros, llama), "a")):
        result = check(*pair)
        assert result.same and result.verdict == "the same model (stored differently: padding of the vocabulary)"
        surplus = [p.surplus for p in result.parts]
        assert [(s.side, s.start, s.stop, s.zeros) for s in surplus] == [(side, 264, 288, True)] * 2
        assert "alone has rows 264 to 287 (zeros)" in printed(result)
    result = check(llama, junk)
    assert not result.same and all(p.changes for p in result.parts) and "not zeros" in result.parts[0].text
    known = open_checkpoint(junk)
    assert check(
        open_checkpoint(llama), replace(known, spec=known.spec.replace(true_vocab=264))
    ).same  # behind the last token
    edited = changed(zeros, tmp_path / "edited", lambda w: w["lm_head.weight"][263].neg_())
    assert [p.name for p in check(llama, edited).parts if p.values] == ["lm_head"]  # common rows are compared


def test_tied_and_untied(tmp_path: Path) -> None:
    tied = tiny.save("llama_tied", tmp_path / "a")

    def untie(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
        return lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] * value})

    config = lambda c: c.update(tie_word_embeddings=False)  # noqa: E731
    equal = changed(tied, tmp_path / "b", untie(1.0), config)
    for pair in ((tied, equal), (equal, tied)):
        result = check(*pair)
        assert result.same and result.verdict == "the same model (stored differently: one of them tied)"
    other = check(tied, changed(tied, tmp_path / "c", untie(2.0), config))
    assert not other.same and other.parts[0].values.differing == 264 * 120
    assert other.parts[0].text.startswith("lm_head: A has none, its embedding serves as one, every element differs")


# ------------------------------------------------------------------------------------------------------------ configs

CONFIGS: dict[str, tuple[Callable[[dict], object], str, bool]] = {
    "rope": (lambda c: c["rope_parameters"].update(rope_theta=5e5), "rope base: 10000 and 500000", True),
    "scaling": (
        lambda c: c["rope_parameters"].update(rope_type="linear", factor=2.0),
        "rope scaling: none and linear",
        True,
    ),
    "eps": (lambda c: c.update(rms_norm_eps=1e-6), "norm eps: 1e-05 and 1e-06", True),
    "act": (lambda c: c.update(hidden_act="relu"), "activation: silu and relu", True),
    "context": (lambda c: c.update(max_position_embeddings=999), "context: 128 and 999", False),
    "bos": (lambda c: c.update(bos_token_id=9), "bos_token_id: 1 and 9", False),
    "eos": (lambda c: c.pop("eos_token_id"), "eos_token_id: 2 and none", False),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case: str, llama: Path, tmp_path: Path) -> None:
    edit, text, function = CONFIGS[case]
    result = check(llama, changed(llama, tmp_path / "b", None, edit))
    assert [(f.text, f.function) for f in result.fields] == [(text, function)]
    assert result.same is not function and result.same_weights
    assert result.verdict == (f"same weights, different config: {text.split(':')[0]}" if function else "the same model")
    assert text in printed(result)


def test_heads_that_no_shape_shows(tmp_path: Path) -> None:
    """4 x 3 heads of 10 and 2 x 3 heads of 20 have the same weights; they are not the same model."""
    one = tiny.save("mistral", tmp_path / "a")
    two = changed(
        one, tmp_path / "b", None, lambda c: c.update(num_attention_heads=6, num_key_value_heads=2, head_dim=20)
    )
    result = check(one, two)
    assert result.same_weights and not result.same
    assert [f.text for f in result.fields] == ["key/value heads: 4 and 2", "head width: 10 and 20"]


def test_every_field_of_the_spec_is_compared() -> None:
    base = Spec(
        "llama",
        layers=2,
        width=8,
        vocab=16,
        kv_heads=2,
        group=3,
        head_dim=4,
        ffn=12,
        experts=4,
        expert_ffn=6,
        top_k=2,
        clip_qkv=9.0,
        moe_layers=(1,),
        windows=(0, 5),
        attn_experts=2,
        attn_top_k=1,
    )
    other = {int: 10, float: 0.5, str: "other", type(None): 3}
    for field in fields(Spec):
        old = getattr(base, field.name)
        new = {"rope": Rope(7.0), "rope_local": Rope(7.0), "windows": (3, 3), "moe_layers": (0,), "top_k": 3,
               "attn_top_k": 2}.get(field.name)  # fmt: skip
        if new is None:
            new = not old if type(old) is bool else other[type(old)]
        found = list(spec_fields(base, base.replace(**{field.name: new})))
        assert found, field.name
        inert = field.name in ("family", "context", "true_vocab", "vocab", "tied")
        assert all(f.function is not inert for f in found), field.name
    same = replace(base, moe_layers=(), windows=())
    assert not list(spec_fields(same, replace(same, moe_layers=(0, 1), windows=(0, 0))))


def test_tokenizers(llama: Path, tmp_path: Path) -> None:
    def tokenizer(folder: Path, words: list[str], more: str = "") -> Path:
        vocab = {w: i for i, w in enumerate(words)}
        body = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "a"}}
        (folder / "tokenizer.json").write_text(json.dumps(body) + more)
        return folder

    one = tokenizer(changed(llama, tmp_path / "a"), ["a", "b", "c"])
    assert check(one, tokenizer(changed(llama, tmp_path / "b"), ["a", "b", "c"])).fields == ()
    blank = check(one, tokenizer(changed(llama, tmp_path / "c"), ["a", "b", "c"], "\n"))
    assert blank.same and [f.name for f in blank.fields] == ["bytes of tokenizer.json"]
    moved = check(one, tokenizer(changed(llama, tmp_path / "d"), ["a", "c", "b"]))
    assert not moved.same and "2 tokens have another one, such as 'b'" in moved.verdict
    longer = check(one, tokenizer(changed(llama, tmp_path / "e"), ["a", "b", "c", "d"]))
    assert longer.same and "tokens of the tokenizer: 3 and 4" in printed(longer)


# ------------------------------------------------------------------------------------------------------- what is said


def test_many_parts_are_summed_up(tmp_path: Path) -> None:
    text = printed(check(tiny.save("mixtral", tmp_path / "a"), tiny.save("qwen3_moe", tmp_path / "b")))
    assert len(text.splitlines()) < 40
    assert "(and 5 more layers.*.attn.q)" in text and "more parts (--json lists all of them)" in text
    assert "missing in A" in text or "missing in B" in text


def test_command_line(llama: Path, tmp_path: Path) -> None:
    other = changed(llama, tmp_path / "b", lambda w: w[DOWN][0].neg_())
    same = CliRunner().invoke(cli.main, ["verify", str(llama), str(llama)])
    assert (same.exit_code, same.output.splitlines()[-1]) == (0, "the same model")
    differs = CliRunner().invoke(cli.main, ["verify", str(llama), str(other), "--json", "--max-memory", "1MiB"])
    data = json.loads(differs.output)
    assert differs.exit_code == 1 and not data["same"] and [p["name"] for p in data["parts"]] == ["layers.3.mlp.down"]
    assert data["parts"][0]["values"]["differing"] == 144
    broken = CliRunner().invoke(cli.main, ["verify", str(llama), str(tmp_path / "none")])
    assert broken.exit_code == 1 and "does not exist" in broken.output and "Traceback" not in broken.output


# ---------------------------------------------------------------------------------------------- what nobody knows


def test_a_key_that_is_not_understood_is_in_the_verdict(llama: Path, tmp_path: Path) -> None:
    other = changed(llama, tmp_path / "b", config=lambda c: c.update(is_causal=False))
    same = changed(llama, tmp_path / "c", config=lambda c: c.update(is_causal=False))
    for pair in ((llama, other), (other, llama)):
        result = check(*pair)
        assert not result.same and result.alike and result.same_weights
        assert result.verdict.startswith("same weights, but not known to be the same model: ")
        assert "is_causal" in result.verdict and "is_causal" in printed(result)
    assert check(other, same).verdict == "the same model"  # it says the same on both sides
    again = changed(llama, tmp_path / "d", config=lambda c: c.update(is_causal=0.5))
    assert not check(other, again).same


def test_what_a_reader_guessed_is_in_the_verdict(llama: Path, tmp_path: Path) -> None:
    one, other = open_checkpoint(llama), open_checkpoint(llama)
    result = check(one, replace(other, notes=("the base of the rope is not said; 10000 was taken",)))
    assert result.same
    assert result.verdict == ("the same model, if it was read rightly: B: the base of the rope is not said; 10000 was "
                              "taken")  # fmt: skip
    assert result.to_json()["notes"][0]["side"] == "b"


TOKENS = {"version": "1.0", "model": {"type": "BPE", "vocab": {f"t{i}": i for i in range(264)},
                                      "merges": [["t1", "t2"], ["t3", "t4"]]}, "added_tokens": []}  # fmt: skip


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t["model"]["merges"].reverse(), "merges of the tokenizer, from number 0 on"),
        (lambda t: t["model"]["merges"].pop(), "merges of the tokenizer, from number 1 on"),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), "normalizer of the tokenizer"),
        (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer of the tokenizer"),
        (lambda t: t["model"]["vocab"].update(zz=t["model"]["vocab"].pop("t5")), "tokens of the tokenizer (1 ids mean"),
        (lambda t: t["model"]["vocab"].update(t1=2, t2=1), "ids of the tokenizer (2 tokens"),
    ],
)
def test_another_tokenizer_is_another_model(edit: Callable[[dict], object], words: str, llama: Path, tmp_path: Path):
    for name in ("a", "b"):
        tokens = json.loads(json.dumps(TOKENS))
        if name == "b":
            edit(tokens)
        changed(llama, tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokens))
    result = check(tmp_path / "a", tmp_path / "b")
    assert not result.same and words in result.verdict


def test_merges_may_be_written_in_two_ways_and_a_tokenizer_may_be_missing(llama: Path, tmp_path: Path) -> None:
    for name, merges in (("a", [["t1", "t2"]]), ("b", ["t1 t2"])):
        changed(llama, tmp_path / name)
        tokens = {**TOKENS, "model": {**TOKENS["model"], "merges": merges}}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokens))
    assert check(tmp_path / "a", tmp_path / "b").same
    result = check(tmp_path / "a", llama)
    assert result.same and [f.text for f in result.fields] == ["tokenizer: hf and none"]


def test_the_last_line_agrees_with_the_logits(llama: Path) -> None:
    found = check(llama, llama)
    apart = LogitReport(False, False, (2, 32), 264, 1e-5, 3.56, 1.2, 0.7, 0.4)
    answer = Verified(found, apart)
    assert found.same and not answer.same
    out = io.StringIO()
    render.show(answer, Console(file=out, width=200))
    assert out.getvalue().splitlines()[-1].startswith("not the same model, though weights and configs look the same")
    assert (answer.to_json()["same"], answer.to_json()["verdict"]) == (False, answer.verdict)
    assert Verified(found).verdict == "the same model"
