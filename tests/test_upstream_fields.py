"""Every field of Spec x every Hugging Face family, held against what transformers computes; nothing is listed by hand.

What is written: a model with one field changed, in every family that claims to hold it, is run by transformers and by
the plain reference model.  What is read: a config with one key changed is refused, or read as what transformers makes
of it.  A sample of the pairs runs always, all of them with the slow tests.
"""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path

import pytest
import torch

from surgery.containers import open_tensors
from surgery.conversion.convert import execute, plan_for
from surgery.conversion.request import Write
from surgery.errors import SurgeryError
from surgery.formats.base import Checkpoint
from surgery.formats.hf.config import misfits, read_config
from surgery.formats.hf.families import FAMILIES
from surgery.formats.hf.table import table
from surgery.formats.topology import ONE_RANK, Rank
from surgery.formats.unknown import Unknown
from surgery.formats.weave import gather
from surgery.model.spec import PARTS, Spec, template_of
from surgery.tensors.in_memory import InMemory
from tests import oracle, reference, tiny
from tests.test_formats import BASES, DENSE, variants

MOE = BASES["mixtral"]
MODELS = {
    **BASES,
    "qwen2": DENSE.replace(family="qwen2", qkv_bias=True, norm_eps=1e-6),
    "olmo": DENSE.replace(family="olmo", norm="none"),
    "olmo3": DENSE.replace(family="olmo3", norm_at="post", qk_norm="full", windows=(7, 0)),
    "gpt2": BASES["gpt_neox"].replace(family="gpt2", rope=None, learned_positions=64, parallel=False, act="gelu_tanh"),
    "qwen3_moe": MOE.replace(family="qwen3_moe", qk_norm="head", ffn=20, moe_layers=(1,)),
    "qwen2_moe": MOE.replace(family="qwen2_moe", qkv_bias=True, shared_ffn=12, shared_gate=True),
    "glm4_moe": MOE.replace(
        family="glm4_moe", router_score="sigmoid", router_bias=True, router_scale=1.5, shared_ffn=12
    ),
    "ernie4_5_moe": MOE.replace(family="ernie4_5_moe", router_bias=True, shared_ffn=24, tied=True),
    "granite": DENSE.replace(
        family="granite", embed_scale=12.0, residual_scale=0.22, score_scale=0.3, logits_divisor=6.0
    ),
    "granitemoe": MOE.replace(
        family="granitemoe", embed_scale=3.0, residual_scale=0.5, score_scale=0.2, logits_divisor=4.0
    ),
    "granitemoeshared": MOE.replace(family="granitemoeshared", shared_ffn=20),
    "olmoe": MOE.replace(family="olmoe", qk_norm="full", top_k_renormalised=False),
    "flex_olmo": MOE.replace(family="flex_olmo", qk_norm="full", norm_at="post"),
}
IDS = torch.arange(2 * 20).reshape(2, 20) * 7 % 40
CLOSE = 2e-4  # of the spread of the logits: fp32 in another order


def checkpoint(spec: Spec) -> Checkpoint:
    generator = torch.Generator().manual_seed(1)

    def fill(name: str) -> InMemory:
        shape = [torch.Size([spec.sizes[a] for a in group]).numel() for group in PARTS[template_of(name)].layout]
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            return InMemory(0.2 * noise + (0.0 if name.endswith("bias") else 1.0))
        return InMemory(noise if name == "embed" else noise * 1.5 * shape[-1] ** -0.5)

    return Checkpoint("made", Path("/nowhere"), spec, {name: fill(name) for name in spec.part_names()})


def held() -> list[tuple[str, str, str]]:
    """(model, change, family) of everything that a family claims to hold."""
    return [
        (model, change, family)
        for model, base in MODELS.items()
        for change, spec in variants(base)
        for family in FAMILIES
        if not FAMILIES[family].code and not misfits(spec, family)  # those with code of their own: their own tests
    ]


def sampled(pairs: list, of: int) -> list:
    """One of so many always, all with the thorough tests."""
    few = {pair for pair in pairs if zlib.crc32("/".join(pair).encode()) % of == 0}
    return [pair if pair in few else pytest.param(*pair, marks=pytest.mark.thorough) for pair in pairs]


@pytest.mark.parametrize(("model", "change", "family"), sampled(held(), 12))
def test_what_is_written_is_what_transformers_computes(model, change, family, tmp_path):
    spec = dict(variants(MODELS[model]))[change]
    made = checkpoint(spec)
    write = Write(to="hf", options={"family": family}, verify=False, sync=False)
    execute(plan_for(made, write), tmp_path / "out")
    ids = IDS % spec.vocab
    ours, theirs = reference.logits(made, ids), oracle.hf_logits(tmp_path / "out", ids)
    assert oracle.gap(theirs, ours) < CLOSE


# ------------------------------------------------------------------------------------------------------- reading

_LONG = [1.5, 1.0, 2.0, 3.0, 1.2]
ROPES = [
    {"rope_type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 16},
    {"rope_type": "longrope", "short_factor": [1.0] * 5, "long_factor": _LONG, "original_max_position_embeddings": 16},
    {"rope_type": "longrope", "short_factor": [1.0] * 5, "long_factor": _LONG, "factor": 3.0},
    {"rope_type": "default", "partial_rotary_factor": 0.2}, {"rope_type": "default", "rope_theta": 777.0},
    {"rope_type": "default", "factor": 8.0}, {"rope_type": "default", "mrope_section": [1, 2, 2]},
]  # fmt: skip
# keys that other families have, each with a value that would change a model that reads it
FOREIGN = {
    "is_causal": True, "partial_rotary_factor": 0.125, "softmax_scale": 0.5, "sliding_window": 3, "rope_theta": 5e4,
    "attention_bias": False, "use_qk_norm": False, "attention_multiplier": 0.5, "residual_multiplier": 0.5,
    "rotary_pct": 0.125, "original_max_position_embeddings": 16, "num_experts_per_tok": 1, "head_dim": 5,
    "final_logit_softcapping": 3.0, "attn_logit_softcapping": 3.0, "logit_scale": 0.5, "use_sliding_window": False,
    "no_rope_layers": 0, "attention_chunk_size": 3, "rope_parameters": {}, "rope_scaling": {},
    "scale_attn_weights": True,
}  # fmt: skip
WORDS = {"silu": ["gelu", "relu"], "gelu": ["silu"], "gelu_new": ["relu"]}


def others(key: str, value: object) -> list[object]:
    """Other values of the same type."""
    if key in ("rope_parameters", "rope_scaling"):
        return [*ROPES]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 1] if value else [1]
    if isinstance(value, float):
        return [value * 2 + 0.25]
    return [*WORDS.get(value, ())] if isinstance(value, str) else []


def stated(name: str) -> dict[str, object]:
    """The config of a tiny model, and the keys that it might have."""
    return {**FOREIGN, **tiny.config(name).to_dict()}


@cache
def upstream(name: str) -> tuple[torch.nn.Module, str]:
    return tiny.model(name), tiny.FAMILIES[name][0]


def mutations() -> list[tuple[str, str, str]]:
    """(model, key, number of the other value) of every key of every config, and of keys that other families have."""
    return [
        (name, key, str(i))
        for name in tiny.FAMILIES
        for key, value in stated(name).items()
        for i, _ in enumerate(others(key, value))
    ]


def run_upstream(name: str, config: dict[str, object]) -> torch.Tensor | None:
    """Logits of a tiny model's weights under another config; None where upstream refuses it, or has other weights."""
    from transformers import AutoModelForCausalLM

    built, _ = upstream(name)
    try:
        other = AutoModelForCausalLM.from_config(type(built.config).from_dict(config), attn_implementation="eager")
        other.load_state_dict(built.state_dict())
        with torch.no_grad():
            return other.float().eval()(IDS, use_cache=False).logits
    except Exception:  # whatever it is, nobody runs such a model
        return None


@pytest.mark.parametrize(("name", "key", "number"), sampled(mutations(), 24))
def test_what_is_read_is_what_transformers_computes(name, key, number, tiny_hf):
    built, _ = upstream(name)
    config = {**json.loads(built.config.to_json_string(use_diff=False)), "architectures": [type(built).__name__]}
    config[key] = others(key, stated(name)[key])[int(number)]
    try:
        spec, _, notes = read_config(config, "config.json")
        if any(isinstance(note, Unknown) for note in notes):
            return
        tensors = open_tensors(tiny_hf(name))
        parts = gather(table(spec.family, tensors), {Rank(): tensors}, spec, ONE_RANK).parts
        ours = reference.logits(Checkpoint("made", Path("/nowhere"), spec, parts), IDS)
    except SurgeryError:
        return
    theirs = run_upstream(name, config)
    if theirs is not None:
        assert oracle.gap(theirs, ours) < CLOSE
