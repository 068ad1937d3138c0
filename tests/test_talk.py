"""`talk.answer`: greedy, offline, and clear about folders that cannot speak."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from surgery.errors import ConfigError, FileError, LayoutError, UsageError
from surgery.running.chat import answer

WORDS = "the of a is capital what france paris river tower king queen".split()
TEMPLATE = "{% for m in messages %}the {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} is{% endif %}"


def build(folder: Path, template: str | None = None, vocab: int = len(WORDS)) -> LlamaForCausalLM:
    """A tiny llama with random weights and a tokenizer that knows twelve words."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="the"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="the", pad_token="the")
    fast.chat_template = template
    fast.save_pretrained(folder)
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def continued(model: LlamaForCausalLM, text: str, steps: int) -> str:
    """What the model says, one arg-max after the other: no `generate`, no cache, no tokenizer."""
    ids = [WORDS.index(word) for word in text.split()]
    start = len(ids)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return " ".join(WORDS[i] for i in ids[start:])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


def test_a_base_model_continues_the_question(folder: Path) -> None:
    model = build(folder)
    expected = continued(model, "what is the capital of france", 6)
    assert answer(folder, "what is the capital of france", 6) == expected


def test_a_chat_model_sees_its_template(folder: Path) -> None:
    model = build(folder, TEMPLATE)
    expected = continued(model, "the king of france is", 5)
    assert answer(folder, "king of france", 5) == expected
    assert expected != continued(model, "king of france", 5)


def test_settings_of_transformers_are_put_back(folder: Path) -> None:
    from transformers.utils import logging

    build(folder)
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    answer(folder, "king", 1)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_missing_weight_is_an_error_and_not_invented(folder: Path) -> None:
    build(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LayoutError, match=r"layers\.1\.mlp\.up_proj"):
        answer(folder, "king", 1)


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    build(folder, vocab=4)
    with pytest.raises(ConfigError, match="does not belong to this model"):
        answer(folder, "king queen", 1)


def test_code_beside_the_model_is_not_run(folder: Path) -> None:
    build(folder)
    marker = folder.parent / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError):
        answer(folder, "king", 1)
    assert not marker.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_experts_implementation"])
def test_no_kernel_that_a_config_names_is_asked_for(key: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would load it from a hub, and it is code."""
    from transformers import modeling_utils

    expected = continued(build(folder), "king of france", 5)
    config = json.loads((folder / "config.json").read_text()) | {key: "some-org/some-kernel"}
    (folder / "config.json").write_text(json.dumps(config))
    asked: list[object] = []
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda *args, **more: asked.append(args))
    assert answer(folder, "king of france", 5) == expected
    assert not asked


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 100_000},
        {"num_return_sequences": 5, "num_beams": 5},
        {"min_new_tokens": 10**9},
        {"prompt_lookup_num_tokens": 10**9},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"guidance_scale": 3.0},
        {"do_sample": True, "temperature": 50.0},
    ],
    ids=str,
)
def test_generation_settings_of_the_folder_do_not_count(settings: dict[str, object], folder: Path) -> None:
    expected = continued(build(folder), "king of france", 5)
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert answer(folder, "king of france", 5) == expected


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": ')


def unknown_family(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no_such_family"}')


def truncated_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize("damage", [broken_config, unknown_family, truncated_weights, no_tokenizer])
def test_a_damaged_folder_is_one_clear_error(folder: Path, damage) -> None:
    build(folder)
    damage(folder)
    with pytest.raises(ConfigError, match="cannot load") as caught:
        answer(folder, "king", 1)
    assert caught.value.file == str(folder)
    assert str(caught.value).isascii()


def test_only_hugging_face_folders_with_safetensors_speak(folder: Path) -> None:
    with pytest.raises(FileError, match="does not exist"):
        answer(folder, "king")
    build(folder)
    with pytest.raises(FileError, match="is no folder"):
        answer(folder / "config.json", "king")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileError, match="no safetensors"):
        answer(folder, "king")
    shutil.move(folder / "config.json", folder / "params.json")
    with pytest.raises(FileError, match=r"(?s)no config\.json.*--to hf"):
        answer(folder, "king")


@pytest.mark.parametrize(("question", "tokens"), [("", 5), (" \n", 5), ("king", 0), ("king", -1)])
def test_senseless_questions(tmp_path: Path, question: str, tokens: int) -> None:
    with pytest.raises(UsageError):
        answer(tmp_path, question, tokens)
