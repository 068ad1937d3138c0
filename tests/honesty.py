"""Does `verify` ever call two models the same that are not?  Keys of configs are changed; transformers' logits judge.

    python -m tests.honesty                     # `make test-honesty`: every family, every change (an hour on two cores)
    python -m tests.honesty llama qwen3_moe --sample 100

A lie is a pair that `verify` calls the same and whose logits differ by more than the noise of fp32.  A pair that it
does not call the same, though the logits are equal, is only counted: that is caution.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import surgery
from surgery.errors import SurgeryError
from surgery.running.loading import quiet
from tests import tiny

NOISE = 5e-6  # of the largest logit: other kernels for the same attention
LENGTH = 100  # tokens: behind every window, and behind the shortest context of the ropes below
NAMES = ("transformers_version", "architectures", "model_type", "_name_or_path")
# keys that some family or another version of transformers knows, at values that would show
STRANGE: dict[str, Any] = {
    "activation_function": "relu", "attention_bias": True, "attention_multiplier": 0.3, "attn_logit_softcapping": 30.0,
    "attention_chunk_size": 4, "clip_qkv": 0.5, "decoder_sparse_step": 2, "embedding_multiplier": 2.0,
    "final_logit_softcapping": 10.0, "first_k_dense_replace": 3, "head_dim": 10, "hidden_act": "gelu",
    "hidden_activation": "gelu", "is_causal": False, "is_decoder": False, "layer_norm_eps": 0.1,
    "layer_norm_epsilon": 0.1, "layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 3, "logit_scale": 2.0,
    "logits_scaling": 2.0, "max_window_layers": 2, "mlp_bias": True, "mlp_only_layers": [1], "moe_k": 2,
    "moe_layer_interval": 2, "moe_norm_min": 0.5, "n_group": 2, "no_rope_layers": [1, 0, 1, 0, 1, 0],
    "norm_eps": 0.1, "norm_topk_prob": True, "num_experts_per_tok": 2, "partial_rotary_factor": 0.4,
    "qk_layernorm": True, "query_pre_attn_scalar": 7, "residual_multiplier": 0.5, "rms_norm_eps": 0.1,
    "rms_norm_unit_offset": True, "rope_interleaved": True, "rope_local_base_freq": 55.0, "rope_theta": 777.0,
    "rope_scaling": {"rope_type": "linear", "factor": 3.0}, "rotary_emb_base": 500, "rotary_pct": 0.6,
    "routed_scaling_factor": 1.7, "scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False,
    "scoring_func": "softmax", "shared_expert_intermediate_size": 20, "sliding_window": 5,
    "tie_word_embeddings": True, "topk_group": 1, "use_bias": True, "use_bidirectional_attention": True,
    "use_parallel_residual": False, "use_qk_norm": True, "use_sliding_window": True,
}  # fmt: skip
_LONG = {"rope_type": "longrope", "short_factor": [1.0] * 5, "long_factor": [2.0] * 5,
         "original_max_position_embeddings": 32}  # fmt: skip
ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.5},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.3, "beta_fast": 4, "truncate": False},
    _LONG,
    {**_LONG, "factor": 4.0},
    {**_LONG, "attention_factor": 1.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
)  # fmt: skip
ACTIVATIONS = ("gelu", "relu", "gelu_new", "gelu_pytorch_tanh", "silu", "relu2")
AROUND_ROPES = {"max_position_embeddings": (64, 256, 512), "rope_theta": (777.0,), "partial_rotary_factor": (0.4,),
                "original_max_position_embeddings": (64, 512)}  # fmt: skip


@dataclass
class Tally:
    """What came of the pairs of a family."""

    tried: int = 0
    refused: int = 0
    cautious: int = 0
    lies: list[str] = field(default_factory=list)


def others(value: Any) -> list[Any]:
    """Other values of the same kind."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1, value * 2, max(1, value // 2)]
    if isinstance(value, float):
        return [value * 2, value * 1.0001]
    if isinstance(value, str):
        return [a for a in ACTIVATIONS if a != value]
    if isinstance(value, list):
        return [value[::-1], value[:-1], [x * 1.5 if isinstance(x, float) else x for x in value]]
    return [1, 0.5, True] if value is None else []


def pairs(config: dict[str, Any], defaults: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(what is changed, config, changed config), with the config's own rope and with every other one."""
    for key in sorted(({*config, *defaults}) - {*NAMES, "rope_parameters"}):
        for value in others(config.get(key, defaults.get(key))):
            yield f"{key} = {value}", config, {**config, key: value}
        if key in config:
            yield f"no {key}", config, {k: v for k, v in config.items() if k != key}
    for key, value in STRANGE.items():
        if config.get(key) != value:
            yield f"{key} = {value}", config, {**config, key: value}
    rope = config.get("rope_parameters")
    if rope is None or "full_attention" in rope:
        return
    for other in (rope, *({"rope_theta": 10000.0, **r} for r in ROPES)):
        base = {**config, "rope_parameters": other}
        yield from ((f"{other['rope_type']}: {what}", base, changed) for what, changed in _rope_changes(base))


def _rope_changes(base: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, value in base["rope_parameters"].items():
        for other in others(value):
            changed = copy.deepcopy(base)
            changed["rope_parameters"][key] = other
            yield f"{key} = {other}", changed
        changed = copy.deepcopy(base)
        del changed["rope_parameters"][key]
        yield f"no {key}", changed
    for key, values in AROUND_ROPES.items():
        for value in values:
            yield f"{key} = {value} beside it", {**base, key: value}


def judge(family: str, folder: Path, sample: int = 0, seed: int = 0) -> Tally:
    """Try the changes of a family, or so many of them at random."""
    from transformers import AutoConfig

    source = tiny.save(family, folder / "source", "bfloat16")
    with quiet():
        defaults = AutoConfig.from_pretrained(source).to_dict()
    found = list(pairs(json.loads((source / "config.json").read_text()), defaults))
    if sample and sample < len(found):
        found = random.Random(f"{seed} {family}").sample(found, sample)
    tally = Tally()
    for number, (what, one, other) in enumerate(found):
        ask(tally, f"{family}: {what}", *(build(source, folder / f"{number}{s}", c) for s, c in
                                             (("a", one), ("b", other))))  # fmt: skip
    return tally


def build(source: Path, folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for file in source.glob("*.safetensors"):
        (folder / file.name).symlink_to(file)
    return folder


def ask(tally: Tally, what: str, a: Path, b: Path) -> None:
    tally.tried += 1
    try:
        found = surgery.verify(a, b)
    except SurgeryError:
        tally.refused += 1
        return
    if not found.same and not found.alike:
        return
    x, y = logits(a), logits(b)
    if x is None or y is None:
        return
    far = float((x - y).abs().max() / x.abs().max()) if x.shape == y.shape else float("inf")
    if found.same and far > NOISE:
        tally.lies.append(f"{what}: {found.verdict}, but the logits differ by {far:.2g}")
    tally.cautious += not found.same and far == 0


def logits(folder: Path) -> torch.Tensor | None:
    """What transformers computes; None if it cannot."""
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(3, 250, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    try:
        with quiet(), torch.inference_mode():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager",
                                                         local_files_only=True)  # fmt: skip
            return model.eval()(tokens).logits[0]
    except Exception:
        return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="of tests/tiny.py (default: all)")
    parser.add_argument("--sample", type=int, default=0, help="so many changes of each, at random (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    lies = 0
    for family in given.families or tiny.FAMILIES:
        with tempfile.TemporaryDirectory(prefix="honesty-") as folder:
            tally = judge(family, Path(folder), given.sample, given.seed)
        print(f"{family}: {tally.tried} pairs, {tally.refused} refused, {tally.cautious} cautious, "
              f"{len(tally.lies)} lies", *tally.lies, sep="\n  ", flush=True)  # fmt: skip
        lies += len(tally.lies)
    return 1 if lies else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
