"""Checkpoints of any format as modules in training, and modules as checkpoints, against transformers' own loading."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from surgery.conversion.convert import convert, execute, plan_for
from surgery.conversion.request import Write
from surgery.errors import LayoutError
from surgery.formats.registry import open_checkpoint
from surgery.midtraining.model import checkpoint_of, load, noise_of_source, weights_now
from surgery.midtraining.precision import Masters
from surgery.running.layerwise import forward, with_family
from surgery.tensors.lazy import Fill, same_bits
from tests import tiny

HAS = "the source's config has"
IDS = torch.randint(0, tiny.SIZES["v"], (2, 19), generator=torch.Generator().manual_seed(3))


def reference(folder) -> torch.Tensor:
    """Logits by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_loaded_model_is_what_transformers_loads_and_goes_back_bit_for_bit(family, tiny_hf):
    source = with_family(open_checkpoint(tiny_hf(family)))
    model, digest = load(source, torch.float32, "cpu")
    assert model.training and not model.config.use_cache
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    torch.testing.assert_close(logits, reference(tiny_hf(family)), rtol=0, atol=2e-5)
    torch.testing.assert_close(forward(source, IDS, "float32").logits, logits, rtol=0, atol=2e-5)
    back = checkpoint_of(weights_now(model, {}), source)
    assert [n for n, p in source.parts.items() if not same_bits(p.full(), back.parts[n].full())] == []
    assert len(digest) == 64


@pytest.mark.parametrize(("family", "to"), [("llama", "meta"), ("olmo2", "olmo"), ("olmoe", "olmo-core"),
                                            ("mixtral", "megatron")])  # fmt: skip
def test_from_one_format_into_another_without_a_copy_between(family, to, tiny_hf, tmp_path):
    options = {"max_positions": "128"} if to == "meta" else {}
    made = convert(tiny_hf(family), tmp_path / to, to=to, sync=False)
    source = with_family(open_checkpoint(tmp_path / to, options=options))
    model, digest = load(source, torch.float32, "cpu")
    assert digest == made.content_digest or to == "megatron"  # which pads the vocabulary
    with torch.no_grad():
        logits = model(input_ids=IDS).logits[..., : tiny.SIZES["v"]]
        torch.testing.assert_close(logits, reference(tiny_hf(family)), rtol=0, atol=2e-5)
        for parameter in model.parameters():
            parameter += 0.01
        wanted = model(input_ids=IDS).logits
    now = checkpoint_of(weights_now(model, {}), source, step=7)
    assert now.details["iteration"] == now.details["step"] == 7
    execute(plan_for(now, Write(to="hf", sync=False)), tmp_path / "hf")
    torch.testing.assert_close(reference(tmp_path / "hf"), wanted, rtol=0, atol=2e-5)


def test_bf16_weights_are_exported_from_their_masters(tiny_hf):
    source = with_family(open_checkpoint(tiny_hf("llama")))
    model, _ = load(source, torch.bfloat16, "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    masters = Masters([{"params": list(model.parameters())}])
    weights = weights_now(model, {id(held): master for held, master in masters.pairs})
    assert {t.dtype for t in weights.values()} == {torch.float32}
    parts = checkpoint_of(weights, source, "bfloat16").parts
    assert all(same_bits(p.full().bfloat16(), parts[n].full()) for n, p in source.parts.items())


def test_dropout_is_off_unless_it_is_asked_for(tiny_hf):
    source = open_checkpoint(tiny_hf("gpt2"))
    shares = {m.p for m in load(source, torch.float32, "cpu", dropout=0.25)[0].modules() if hasattr(m, "p")}
    assert shares == {0.25}
    assert {m.p for m in load(source, torch.float32, "cpu")[0].modules() if hasattr(m, "p")} == {0.0}


@pytest.mark.parametrize(("family", "changes", "said"), [
    ("gpt2", {}, "attn_pdrop 0.1, embd_pdrop 0.1, resid_pdrop 0.1"),
    ("mixtral", {"router_jitter_noise": 0.01}, "router_jitter_noise 0.01"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout 0.1"),
    ("llama", {}, ""),
])  # fmt: skip
def test_noise_that_the_source_trained_with_is_named(family, changes, said, tmp_path):
    source = open_checkpoint(tiny.save(family, tmp_path / "hf", **changes))
    assert noise_of_source(source, 0.0) == ([f"train.dropout is 0; {HAS} {said}, not used here"] if said else [])
    assert len(noise_of_source(source, 0.1)) == ("jitter" in said)  # the others are what the run has, too


def test_a_part_that_the_model_has_no_place_for_is_named(tiny_hf):
    source = open_checkpoint(tiny_hf("llama"))
    more = replace(source, parts={**source.parts, "layers.0.attn.gate": Fill((3, 5), "float32")})
    with pytest.raises(LayoutError, match=r"no place for layers\.0\.attn\.gate \(0 of 15 elements\)"):
        load(more, torch.float32, "cpu")
