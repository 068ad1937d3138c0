"""Let a converted model speak: the last proof that it is still the same model, and a nice one.

    answer("SmolLM2-135M-Instruct/", "What is the capital of France?")  # -> "The capital of France is Paris."

The folder is a Hugging Face one with safetensors weights.  Nothing is downloaded, no code and no pickle that comes
with the model is run, and a weight that is missing is an error, where transformers alone would make one up.
"""

from __future__ import annotations

from glob import escape
from pathlib import Path
from typing import Any

from surgery.containers.opening import open_tensors
from surgery.errors import ConfigError, FileError, UsageError, show
from surgery.formats.registry import located
from surgery.running.loading import explained, load, load_tokenizer, quiet
from surgery.storage.address import is_address
from surgery.storage.copies import here
from surgery.storage.mirror import COPIED


def answer(path: str | Path, question: str, max_new_tokens: int = 64) -> str:
    """The model's greedy reply of at most `max_new_tokens` tokens, through its chat template if it has one.

    A model without a chat template continues the question.  Raises UsageError, FileError, ConfigError or LayoutError.
    """
    if not question.strip():
        raise UsageError("the question is empty")
    if max_new_tokens < 1:
        raise UsageError(f"cannot answer in {show(max_new_tokens)} tokens; ask for at least 1")
    folder = _folder(path)
    with quiet():
        tokenizer, model = load_tokenizer(folder), load(folder, "auto", None)
        model.generation_config = _greedy(model.generation_config)
        return _reply(tokenizer, model, question, max_new_tokens, folder)


def _folder(path: str | Path) -> Path:
    folder = located(path)
    if not folder.is_dir():
        raise FileError("is no folder", file=folder)
    if not (folder / "config.json").is_file():
        raise FileError(
            "has no config.json: only models in Hugging Face form can be asked",
            file=folder,
            hint=f"surgery convert {path} NEW_FOLDER --to hf",
        )
    if not any(folder.glob("*.safetensors")):
        raise FileError(
            "has no safetensors weights",
            file=folder,
            hint=f"pickled weights are not loaded here; surgery convert {path} NEW_FOLDER --to hf",
        )
    return here(path, only=_needed(folder)) if is_address(path) else folder  # all that is read, only now


def _needed(folder: Path) -> tuple[str, ...]:
    """The files that transformers reads of a folder: the small ones in it, and the weights of one model."""
    small = [path.name for path in folder.iterdir() if path.name.endswith(COPIED)]
    whole = folder / "model.safetensors"
    weights = [whole] if whole.is_file() else [p for held in open_tensors(folder).containers for p in held.paths]
    return tuple(map(escape, sorted([*small, *(path.name for path in weights)])))


def _greedy(found: Any) -> Any:
    """What a generation_config.json may say here: which tokens end an answer.  Beams, penalties and the like do not
    make an answer greedy, and a hundred thousand beams never end."""
    from transformers import GenerationConfig

    return GenerationConfig(bos_token_id=found.bos_token_id, eos_token_id=found.eos_token_id,
                            pad_token_id=found.pad_token_id)  # fmt: skip


def _reply(tokenizer: Any, model: Any, question: str, max_new_tokens: int, folder: Path) -> str:
    with explained("the model cannot answer", folder):
        import torch

        if tokenizer.chat_template:
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
        else:
            inputs = tokenizer(question, return_tensors="pt")
        asked = inputs["input_ids"]
        if asked.numel() == 0 or int(asked.max()) >= model.config.get_text_config().vocab_size:
            raise ConfigError("the tokenizer does not belong to this model: its ids exceed the vocabulary", file=folder)
        with torch.inference_mode():
            tokens = model.generate(
                input_ids=asked,
                attention_mask=inputs["attention_mask"],
                do_sample=False,
                max_new_tokens=max_new_tokens,
            )
        return str(tokenizer.decode(tokens[0, asked.shape[1] :], skip_special_tokens=True)).strip()
