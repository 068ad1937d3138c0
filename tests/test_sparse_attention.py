"""Sparse attention: masks bit for bit as upstream's, values and gradients as a naive loop's, and whole models."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from surgery.cli.main import main
from surgery.containers.yaml_loader import parse_yaml
from surgery.errors import ConfigError
from surgery.formats.hf.hub import modeling_sparse_attention as modeling
from surgery.formats.hf.hub.sparse_patterns import KINDS, mask, pattern_of
from surgery.formats.registry import open_checkpoint
from surgery.midtraining.attention import said_of
from surgery.midtraining.export import export
from surgery.midtraining.loop import fresh_state, prepare, train
from surgery.midtraining.masks.figures import figures
from surgery.midtraining.run_file import make_run
from surgery.midtraining.selftests import self_test
from surgery.midtraining.settings import Attention
from surgery.model.sparse import Sparse
from surgery.model.spec import Spec
from tests import tiny
from tests.test_midtrain_loop import LENGTH, Kept, record, settings

GOLDEN = Path(__file__).parent / "golden" / "sparse_masks"
MASKS = json.loads((GOLDEN / "masks.json").read_text())
OURS = {"causal": "full"}
SPARSE = [kind for kind in KINDS if kind != "full"]


@pytest.mark.parametrize(("length", "heads"), MASKS["sizes"])
def test_masks_are_those_of_upstream_bit_for_bit(length, heads):
    for kind in MASKS["kinds"]:
        found = mask(pattern_of(OURS.get(kind, kind), length, heads), length).numpy()
        name = f"{kind}_{length}_{heads}"
        assert hashlib.sha256(np.packbits(found).tobytes()).hexdigest() == MASKS["sha256"][name], name
        assert (~found.any(-1)).sum() == MASKS["blind"][name]


def sees(kind: str, n: int, heads: int, h: int, i: int, j: int) -> bool:
    """The definitions once more, for numbers."""
    d, width = i - j, n // heads + (h < n % heads)
    start = h * (n // heads) + min(h, n % heads)
    if d < 0 or kind == "full":
        return d >= 0
    if kind == "sliding":
        return d < n // 4
    if kind in ("longformer", "bigbird"):
        window, first = (min(256, n // 4), max(1, min(16, n // 32))) if kind == "longformer" else (
            max(1, min(128, n // 8)), max(1, min(8, n // 64)))  # fmt: skip
        stride = max(16, n // 32)
        return d <= window or i < first or j < first or (kind == "bigbird" and d > window and d % stride == 0)
    if kind == "reformer":
        buckets = max(2, n // max(1, min(64, n // 8)))
        a, b = ((3 * x + 13 * h + 7) % buckets for x in (i, j))
        near = abs(a - b) <= 1 or (buckets > 2 and abs(a - b) == buckets - 1)
        return near or d <= max(1, min(8, n // 4))
    local, band = d <= width, start <= d < start + width
    return {"local_only": local, "exclusive_bands": band, "spattention": local or band,
            "gapped_bands": start <= d < start + width // 2}[kind]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_odd_heads_with_groups_and_documents_against_a_loop_in_float64(kind):
    """9 heads, of which 3 share a key; rows of 3 documents; places count in each of them."""
    heads, groups, width, length, made_for = 9, 3, 4, 30, 22
    lengths = ((13, 10, 7), (1, 4, 25))
    gen = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, n, length, width, generator=gen, requires_grad=True) for n in (heads, groups, groups))
    by = torch.randn(2, length, heads, width, generator=gen)

    def naive() -> torch.Tensor:
        rows = []
        for b, docs in enumerate(lengths):
            starts = np.repeat(np.cumsum((0, *docs[:-1])), docs)
            for h in range(heads):
                for i in range(length):
                    seen = [j for j in range(starts[i], i + 1)
                            if sees(kind, made_for, heads, h, i - starts[i], j - starts[i])]  # fmt: skip
                    one, keys = q[b, h, i].double(), k[b, h // 3, seen].double()
                    rows.append((keys @ one / width**0.5).softmax(0) @ v[b, h // 3, seen].double())
        return torch.stack(rows).view(2, heads, length, width).transpose(1, 2)

    documents = torch.stack([torch.arange(3).repeat_interleave(torch.tensor(docs)) for docs in lengths])
    index = torch.arange(length)
    config = tiny.config("llama")
    config.num_attention_heads = heads
    config.sparse_attention = {"kind": kind, "reference_len": made_for}
    allowed = modeling.sparse_mask(2, length, length, config=config, mask_function=lambda b, h, i, j: (
        (documents[b, i] == documents[b, j]) & (index[j] <= index[i])))  # fmt: skip
    module = type("Attention", (), {"num_key_value_groups": heads // groups})()
    out, _ = modeling.sparse_attention(module, q, k, v, allowed)
    wanted = naive()
    assert (out.double() - wanted).abs().max() < 1e-6
    ours, theirs = (torch.autograd.grad((y * by).sum(), (q, k, v)) for y in (out, wanted))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 3e-6
    blind = ~allowed.any(-1).expand(2, heads, length)
    assert bool(blind.any()) == (kind in ("exclusive_bands", "gapped_bands"))
    assert not out.transpose(1, 2)[blind].any()


@pytest.mark.parametrize("kind", ["exclusive_bands", "reformer"])
def test_values_and_gradients_of_upstream(kind):
    arrays = {name: torch.from_numpy(a) for name, a in np.load(GOLDEN / "attention.npz").items()}
    q, k, v = (arrays[name].requires_grad_() for name in "qkv")
    out, _ = modeling.sparse_attention(None, q, k, v, mask(pattern_of(kind, 64, 8), 64)[None])
    grads = torch.autograd.grad(out.transpose(1, 2), (q, k, v), arrays["grad_out"])
    for name, found in zip(("out", "dq", "dk", "dv"), (out.transpose(1, 2), *grads), strict=True):
        assert (found - arrays[f"{kind}.{name}"]).abs().max() < 5e-6


@pytest.mark.slow
def test_blocks_of_flex_attention_are_the_same_masks():
    """What a GPU computes with: rows of two documents, in blocks; the values by the eager form of flex_attention."""
    heads, length = 5, 160
    config = tiny.config("llama")
    config.num_attention_heads = heads
    documents = (torch.arange(length) >= 57).long()
    gen = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, heads, length, 16, generator=gen) for _ in range(3))
    for kind in ("spattention", "gapped_bands", "bigbird"):
        config.sparse_attention = {"kind": kind, "reference_len": 128}
        allowed = modeling.sparse_mask(1, length, length, config=config, mask_function=lambda b, h, i, j: (
            (documents[i] == documents[j]) & (j <= i)))  # fmt: skip
        place = torch.cat([torch.arange(57), torch.arange(length - 57)])[None]
        blocks = modeling._blocks(modeling.pattern_in(config), place, 57 * documents[None], torch.device("cpu"))
        assert blocks.to_dense().shape[-1] == 2
        exact, _ = modeling.sparse_attention(None, q, k, v, allowed)
        found, _ = modeling.sparse_attention(None, q, k, v, blocks)
        assert (found - exact).abs().max() < 1e-6


# ---------------------------------------------------------------------------------------------------- whole models


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A run of a few steps, and its exported folder in plain transformers."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))

    def go(family: str, attention: Any, steps: int = 5, **changes: Any) -> tuple[Any, Any, list[float]]:
        model = tiny.save(family, tmp_path / family, l=2, h=48, f=40, m=16, **changes)
        said = settings(model, record(tmp_path / "batches.npz", False, True, steps), tmp_path / "run", length=steps)
        job = prepare(make_run({**said, "attention": attention}))
        self_test(job)
        kept = Kept()
        train(job, fresh_state(job), kept)
        export(job, job.run.export[0], tmp_path / "out")
        plain = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", trust_remote_code=True, dtype=torch.float32, experts_implementation="eager"
        )
        return job, plain.eval(), [step["loss"] for step in kept.steps]

    return go


@pytest.mark.parametrize(
    ("kind", "steps"),
    [*((kind, 20) for kind in SPARSE), *(pytest.param(kind, 50, marks=pytest.mark.thorough) for kind in KINDS)],
)
def test_each_kind_trains_and_its_folder_gives_the_same_logits(kind, steps, trained, tmp_path):
    job, plain, losses = trained("llama", kind, steps=steps)
    assert len(losses) == steps and all(np.isfinite(losses)) and losses[-1] < losses[0]
    tokens = torch.randint(0, 264, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = job.model.eval()(input_ids=tokens, use_cache=False).logits
        theirs = plain(input_ids=tokens, use_cache=False).logits
        full = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)(input_ids=tokens).logits
        cache, pieces = None, []
        for first, last in ((0, 9), (9, 10), (10, 17), (17, LENGTH)):
            out = plain(input_ids=tokens[:, first:last], past_key_values=cache, use_cache=True)
            cache, pieces = out.past_key_values, [*pieces, out.logits]
        padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), tokens], 1)
        seen = (torch.arange(LENGTH + 5) >= 5).long().expand(2, -1)
        place = (seen.cumsum(-1) - 1).clamp(min=0)
        behind = plain(input_ids=padded, attention_mask=seen, position_ids=place).logits[:, 5:]
    assert torch.allclose(theirs, ours, atol=1e-4)
    assert torch.allclose(torch.cat(pieces, 1), ours, atol=1e-4)
    assert torch.allclose(behind, ours, atol=1e-4)
    assert torch.allclose(full, ours, atol=1e-4) == (kind == "full")
    once = plain.generate(tokens[:1, :9], max_new_tokens=6, do_sample=False, pad_token_id=0)
    for how in ({"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        again = plain.generate(tokens[:1, :9], max_new_tokens=6, do_sample=False, pad_token_id=0, **how)
        assert torch.equal(once, again), how


@pytest.mark.parametrize("family", ["olmoe", "olmo3", "gpt_neox", "gpt2"])
def test_families(family, trained):
    """Against transformers' eager attention, which is given the mask of every head."""
    more = {"layer_types": ["sliding_attention", "full_attention"]} if family == "olmo3" else {}
    job, plain, _ = trained(family, {"kind": "spattention", "reference_len": 20}, **more)
    tokens = torch.randint(0, 264, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    allowed = mask(pattern_of("spattention", 20, job.source.spec.heads), LENGTH)[None].expand(2, -1, -1, -1)
    wanted = torch.where(allowed, 0.0, -1e9)
    if family == "olmo3":
        near = torch.ones(LENGTH, LENGTH).tril().triu(1 - job.source.spec.windows[0]).bool()
        wanted = {"full_attention": wanted, "sliding_attention": torch.where(allowed & near, 0.0, -1e9)}
    with torch.no_grad():
        found = plain(input_ids=tokens, use_cache=False).logits
        plain.set_attn_implementation("eager")
        expected = plain(input_ids=tokens, attention_mask=wanted, use_cache=False).logits
    assert torch.allclose(found, expected, atol=2e-5)


def test_a_folder_is_read_converted_and_trained_on_as_what_it_is(trained, tmp_path):
    job, _, _ = trained("llama", {"kind": "bigbird", "window": 3, "reference_len": 40})
    again = open_checkpoint(tmp_path / "out")
    assert str(again.spec.sparse) == "bigbird made for 40 tokens, window 3, globals 1, stride 16"
    assert not again.ignored
    assert any("queries of all heads see nothing" in note for note in job.notes)
    changed = prepare(make_run({**job.run.model_dump(mode="json"), "model": {"path": str(tmp_path / "out")},
                                "attention": "full", "output": str(tmp_path / "more")}))  # fmt: skip
    export(changed, changed.run.export[0], tmp_path / "full")
    assert {p.name for p in (tmp_path / "full").glob("*.py")} == set()
    assert not {"auto_map", "sparse_attention"} & json.loads((tmp_path / "full" / "config.json").read_text()).keys()
    to_meta = job.run.export[0].model_copy(update={"to": "meta"})
    with pytest.raises(ConfigError, match="sparse attention: bigbird"):
        export(job, to_meta, tmp_path / "meta")
    export(job, to_meta.model_copy(update={"attention": "full"}), tmp_path / "meta")
    assert open_checkpoint(tmp_path / "meta").spec.sparse is None


def test_what_is_said_of_long_rows_is_counted_on_some_of_them():
    spec = Spec("llama", layers=1, width=8, vocab=9, kv_heads=4, group=4, head_dim=4, ffn=12)
    short, long = (said_of(spec.replace(sparse=Sparse("exclusive_bands", n, {})), n)[0] for n in (512, 8192))
    seen = mask(pattern_of("exclusive_bands", 512, 16), 512)
    assert f"{int((~seen.any(-1)).sum()):,} of {16 * 512:,} queries" in short and "about" not in short
    found = re.search(r"about ([\d.]+)% .* about ([\d,]+) of ([\d,]+) queries", long)
    assert abs(float(found[1]) - 6.25) < 0.1
    assert abs(int(found[2].replace(",", "")) / int(found[3].replace(",", "")) - 0.469) < 0.005


def test_what_is_not_known_is_refused(tmp_path):
    model, batches = tiny.save("llama", tmp_path / "m", l=1), record(tmp_path / "b.npz", False, False)

    def told(**attention: Any) -> str:
        with pytest.raises(ConfigError) as error:
            prepare(make_run({**settings(model, batches, tmp_path / "run"), "attention": attention}))
        return str(error.value)

    assert "spattention" in told(kind="sparse")
    assert "has no 'stride'; it has window, globals" in told(kind="longformer", stride=3)
    assert "no kind" in told(window=3)
    for said in ({"kind": "new"}, {"kind": "bigbird"}, {"kind": "bigbird", "reference_len": -1}, "spattention", [1]):
        config = json.loads((model / "config.json").read_text()) | {"sparse_attention": said}
        (model / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=r"sparse_attention|attention 'new' is not known"):
            open_checkpoint(model)
    assert set(get_args(Attention.model_fields["kind"].annotation)) == {"source", *KINDS}


# --------------------------------------------------------------------------------------------------------- to look at


@pytest.mark.slow
def test_figures_are_those_of_upstream_masks():
    for length, heads in ((128, 8), (1024, 16)):
        for kind in MASKS["kinds"]:
            found, name = figures(pattern_of(OURS.get(kind, kind), length, heads), length), f"{kind}_{length}_{heads}"
            assert (found.blind, found.distances) == (MASKS["blind"][name], MASKS["distances"][name])
            assert round(found.density * heads * length * (length + 1) // 2) == MASKS["true"][name]
            assert found.blocks == pytest.approx(MASKS["blocks128_vs_causal"][name])


def test_show_draws_what_it_says(tmp_path):
    run = CliRunner().invoke(main, ["attention", "show", "--n", "256", "--heads", "8", "spattention", "local_only",
                                    "-o", str(tmp_path / "m.png")])  # fmt: skip
    assert run.exit_code == 0 and "spattention" in run.output and "inferred" in run.output
    data = (tmp_path / "m.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    size = struct.unpack(">I", data[33:37])[0]
    pixels = np.frombuffer(zlib.decompress(data[41 : 41 + size]), np.uint8).reshape(height, width + 1)
    assert not pixels[:, 0].any()
    seen = mask(pattern_of("spattention", 256, 8), 256)[2].numpy()
    assert np.array_equal(pixels[:256, 1 + 2 * 264 : 1 + 2 * 264 + 256] == 0, seen)
    page = CliRunner().invoke(main, ["attention", "show", "--n", "64", "--heads", "3", "-o", str(tmp_path / "m.html")])
    assert page.exit_code == 0 and (tmp_path / "m.html").read_text().count("data:image/png") == len(KINDS)
    found = json.loads(CliRunner().invoke(main, ["attention", "show", "bigbird", "--stride", "5", "--json"]).output)
    assert found[0]["numbers"]["stride"] == 5
    wrong = CliRunner().invoke(main, ["attention", "show", "bigbirds"])
    assert wrong.exit_code == 2 and "there are full, sliding" in wrong.output


@pytest.mark.slow
def test_the_page(tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "attention.md").read_text()
    monkeypatch.chdir(tmp_path)
    for line in re.search(r"```sh\n(.*?)```", page, re.S)[1].splitlines():
        done = CliRunner().invoke(main, line.split()[1:])
        assert done.exit_code == 0, f"{line}: {done.output}"
    assert Path("masks.png").stat().st_size > 1000 and "longformer" in Path("masks.html").read_text()
    assert {row[1:-1] for row in re.findall(r"^\| (`\w+`) \|", page, re.M)} == set(KINDS)
    for text in re.findall(r"```yaml\n(attention.*?)```", page, re.S):
        make_run({"model": {"path": "m"}, "data": {"plan": "p"}, "output": "o", **parse_yaml(text.encode(), "", "run")})
