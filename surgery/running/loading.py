"""Load a Hugging Face folder into transformers: from local safetensors only, running no code, downloading nothing.

    with explained("the model cannot be run", folder), quiet():
        model, tokenizer = load(folder), load_tokenizer(folder)

A weight that is missing is an error, where transformers alone would make one up.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.containers.text import read_json
from surgery.errors import ConfigError, FileError, LayoutError, SurgeryError, show, some
from surgery.formats.hf.families import FAMILIES
from surgery.formats.hf.sparse import implementation
from surgery.tensors.memory import free_memory
from surgery.units import human


@dataclass(frozen=True)
class Classes:
    """The classes of a family that transformers does not have."""

    config: Any
    model: Any


def own_classes(model_type: str) -> Classes | None:
    """Those of a file in `formats/hf/hub`, if the family is computed by one: what lies in a folder is never run."""
    family = FAMILIES.get(model_type)
    if family is None or not family.code:
        return None
    module = importlib.import_module(f"surgery.formats.hf.hub.{family.code.removesuffix('.py')}")
    config = f"{family.architecture.removesuffix('ForCausalLM')}Config"
    return Classes(getattr(module, config), getattr(module, family.architecture))


def own_config(folder: Path) -> Any:
    """The config as transformers itself (or our class, where it has none) reads it.  Raises ConfigError."""
    own = own_classes(_model_type(folder))
    no_code: dict[str, Any] = {} if own else {"trust_remote_code": False}
    with explained("transformers cannot load the config", folder), quiet():
        from transformers import AutoConfig

        config = (own.config if own else AutoConfig).from_pretrained(folder, local_files_only=True, **no_code)
        config._attn_implementation = config._experts_implementation = None
    return config


def load(folder: Path, dtype: str = "float32", by: str | None = "eager") -> Any:
    """A model on the CPU; `dtype` "auto" is that of its weights, `by` names implementations of attention and experts.

    What the config says of implementations does not count: it may name a kernel of a hub, which is code.  Raises
    ConfigError if transformers cannot load it, LayoutError if a weight is missing or has another shape.
    """
    own, config = own_classes(_model_type(folder)), own_config(folder)
    no_code: dict[str, Any] = {} if own else {"trust_remote_code": False}
    with explained("transformers cannot load the model", folder), quiet():
        from transformers import AutoModelForCausalLM

        ways = {"attn_implementation": implementation(config, by), "experts_implementation": by}
        model, info = (own.model if own else AutoModelForCausalLM).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **({} if own else {name: way for name, way in ways.items() if way}),
            **no_code,
        )
    for key, what in (("missing_keys", "are missing"), ("mismatched_keys", "have the wrong shape")):
        if names := info.get(key):
            listed = sorted(show(n if isinstance(n, str) else n[0]) for n in names)
            raise LayoutError(f"{len(listed)} weights {what}: {some(listed)}", file=folder)
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer.  Raises ConfigError if transformers cannot load it."""
    with explained("transformers cannot load the tokenizer", folder), quiet():
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        if own_classes(_model_type(folder)):
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _model_type(folder: Path) -> str:
    """What config.json says; "" if it says nothing that can be read, which transformers will tell."""
    try:
        config = read_json(folder / "config.json", "config.json")
    except FileError:
        return ""
    return str(config.get("model_type")) if isinstance(config, dict) else ""


def logits_divisor(model: Any) -> float:
    """By what the model divides its head's products: Granite's `logits_scaling`, 1 for all others."""
    return float(getattr(model.config, "logits_scaling", 1.0))


def fits(parameters: int) -> bool:
    """Whether a model of this size in fp32 fits into the free memory; True where the system does not tell."""
    free = free_memory()
    return free is None or bytes_of_a_model(parameters) <= free


def check_memory(parameters: int, folder: Path) -> None:
    """Raise SurgeryError if a model of this size in fp32 does not fit into the free memory."""
    if not fits(parameters):
        need, free = human(bytes_of_a_model(parameters)), human(free_memory() or 0)
        raise SurgeryError(f"running it in fp32 needs about {need} of memory, {free} are free", file=folder)


def bytes_of_a_model(parameters: int) -> int:
    """What a model takes in fp32, a quarter of it for the largest weights in their own dtype, and for activations."""
    return parameters * 4 * 5 // 4


@contextlib.contextmanager
def explained(what: str, folder: Path) -> Iterator[None]:
    """Whatever transformers raises on a bad folder (it may be anything) becomes one clear error."""
    try:
        yield
    except SurgeryError:
        raise
    except ImportError as error:
        hint = "pip install 'checkpoint-surgery[tokenizers]'"
        raise SurgeryError(f"{what}: {show(str(error), 200)}", file=folder, hint=hint) from None
    except Exception as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{what}: {type(error).__name__}: {show(text, 300)}", file=folder) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings and progress bars of transformers while we work; its settings are put back after."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
