"""LoRA adapters: every kind that is merged computes what peft computes; every other is refused by name."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import ConfigError, SurgeryError
from surgery.formats.registry import open_checkpoint
from surgery.merging.adapters import with_adapter
from surgery.merging.lora_config import read_lora
from surgery.running.loading import load, quiet
from tests import tiny

Q = "model.layers.0.self_attn.q_proj"
IDS = torch.arange(3, 30)[None]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in made:
            made[family] = tiny.save(family, tmp_path_factory.mktemp("adapters") / family)
        return made[family]

    return base


def merged(base: Path, adapter: Path, out: Path) -> Path:
    surgery.soup({"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}, out)
    return out


def trained(base: Path, folder: Path, rows: int | None = None, **config: Any) -> torch.Tensor:
    """An adapter of random values, written by peft; returns the logits of peft's model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    with quiet():
        model = load(base)
        if rows:
            model.resize_token_embeddings(rows)
        found = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 10, **config}))
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        found.save_pretrained(folder)
        return found.eval()(IDS).logits


CASES = {
    "plain": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "rslora": ("llama", {"target_modules": ["q_proj"], "use_rslora": True}),
    "patterns": ("llama", {"target_modules": ["q_proj", "k_proj"], "alpha_pattern": {"layers.0.self_attn.q_proj": 32},
                           "rank_pattern": {"k_proj": 2, r"layers\.(1|2)\..*": 3}}),
    "one layer": ("llama", {"target_modules": ["v_proj"], "layers_to_transform": [1]}),
    "pattern of modules": ("llama", {"target_modules": r".*\.(?:q_proj|up_proj)", "exclude_modules": r".*layers\.2.*"}),
    "all linear": ("qwen3", {"target_modules": "all-linear"}),
    "biases": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": False}),
    "square linear": ("llama", {"target_modules": ["q_proj"], "fan_in_fan_out": True}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "whole modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "tied, embedding whole": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "tied, head whole": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied, both whole": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied, both whole and one": ("qwen2", {"target_modules": ["q_proj"], "ensure_weight_tying": True,
                                           "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied, embedding": ("qwen2", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied, head": ("qwen2", {"target_modules": ["q_proj", "lm_head"]}),
    "tied, embedding and one": ("qwen2", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "longer vocabulary": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"],
                                    "rows": 270}),
    "orthogonal": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_as_peft_computes_it(case: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    family, config = CASES[case]
    wanted = trained(bases(family), tmp_path / "adapter", **config)
    out = merged(bases(family), tmp_path / "adapter", tmp_path / "out")
    with torch.no_grad():
        got, before = load(out)(IDS).logits, load(bases(family))(IDS).logits
    assert float((got - wanted).abs().max()) < 2e-5 * float(wanted.abs().max())
    assert float((before - wanted[..., : before.shape[-1]]).abs().max()) > 1e-2  # and the adapter does something


def handmade(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """An adapter of q_proj in the first layer, whatever its config says."""
    generator = torch.Generator().manual_seed(1)
    low = {f"{Q}.lora_A.weight": torch.randn(4, 120, generator=generator),
           f"{Q}.lora_B.weight": torch.randn(120, 4, generator=generator)}  # fmt: skip
    folder.mkdir(parents=True)
    stored = {f"base_model.model.{name}": tensor for name, tensor in {**low, **(tensors or {})}.items()}
    save_file(stored, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": False}, "draws at random"),
        ({"layer_replication": [[3, 6], [0, 3]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_bdlora": True}, "use_bdlora"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config"),
        ({"kasa_config": {}}, "kasa_config"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"some_new_method": 1}, "some_new_method"),
        ({"peft_type": "LOHA"}, "is no LoRA adapter"),
        ({"r": 16}, "16 is stated"),
        ({"r": 0}, "r is 0"),
        ({"rank_pattern": {"q_proj": 8}}, "8 is stated"),
        ({"target_modules": ["k_proj"]}, "target_modules leaves out"),
        ({"target_modules": r".*k_proj"}, "target_modules leaves out"),
        ({"exclude_modules": ["q_proj"]}, "target_modules leaves out"),
        ({"layers_to_transform": [1]}, "target_modules leaves out"),
        ({"alpha_pattern": {"(": 2}}, "no regular expression"),
        ({"alpha_pattern": "q_proj"}, "not a mapping"),
        ({"alpha_pattern": {"q_proj": "much"}}, "positive numbers"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"target_modules": [1]}, "a list of names"),
        ({"bias": "some"}, "bias is 'some'"),
    ],
)
def test_refusals(config: dict[str, Any], words: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        with_adapter(open_checkpoint(bases("llama")), handmade(tmp_path / "a", **config))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{Q}.lora_A.default.weight": torch.ones(4, 120)}, "lora_A"),  # a second spelling of the same
        ({"model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(4, 120),
          "model.layers.9.self_attn.q_proj.lora_B.weight": torch.ones(120, 4)}, "does not have"),
        ({"model.layers.1.self_attn.q_proj.lora_A.weight": torch.ones(4, 120)}, "lora_B, which is missing"),
        ({f"{Q}.lora_magnitude_vector": torch.ones(120)}, "lora_magnitude_vector"),
        ({f"{Q}.lora_A.weight": torch.tensor(1.0)}, "lora_A"),
        ({f"{Q}.lora_A.weight": torch.ones(0, 120), f"{Q}.lora_B.weight": torch.ones(120, 0)}, "the weight"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 119)}, "119"),
        ({"model.norm.weight": torch.ones(120)}, "modules_to_save does not name"),
        ({f"{Q}.bias": torch.ones(120)}, "modules_to_save does not name"),
    ],
)  # fmt: skip
def test_odd_tensors(
    tensors: dict[str, torch.Tensor], words: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        with_adapter(open_checkpoint(bases("llama")), handmade(tmp_path / "a", tensors))


def test_a_pattern_of_the_file_ends(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Those that Python's own `re` would look for all day."""
    began = time.monotonic()
    with_adapter(open_checkpoint(bases("llama")), handmade(tmp_path / "a", alpha_pattern={"(([a-z0-9_.])+)+Z": 2}))
    found = read_lora(handmade(tmp_path / "b", target_modules="(a|aa)+$"))
    with pytest.raises(ConfigError, match="takes too long"):
        found.targets("a" * 60 + "b")
    assert time.monotonic() - began < 20


def test_an_adapter_in_a_folder_of_its_name_and_in_the_place_of_a_model(bases, tmp_path: Path) -> None:
    handmade(tmp_path / "run" / "style")
    out = merged(bases("llama"), tmp_path / "run", tmp_path / "out")
    a, b = (load_file(tmp_path / "run" / "style" / "adapter_model.safetensors")[f"base_model.model.{Q}.lora_{x}.weight"]
            for x in "AB")  # fmt: skip
    was, now = (load_file(folder / "model.safetensors")[f"{Q}.weight"] for folder in (bases("llama"), out))
    torch.testing.assert_close(now, was + 2 * b @ a)
    handmade(tmp_path / "run" / "other")
    with pytest.raises(SurgeryError, match="one of other, style is meant"):
        merged(bases("llama"), tmp_path / "run", tmp_path / "no")
    with pytest.raises(SurgeryError, match="is an adapter, not a model") as refused:
        surgery.soup({"merge_method": "passthrough", "models": [{"model": str(tmp_path / "run" / "style")}]},
                     tmp_path / "no")  # fmt: skip
    assert refused.value.hint.startswith("write BASE+")
