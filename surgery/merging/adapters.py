"""LoRA adapters as peft saves them, added to a model lazily: W + scale * B A, row by row, rounded once.

    checkpoint = with_adapter(open_checkpoint("base"), Path("adapter"))     # adapter_config.json, adapter_model.*

The result computes what `PeftModel` does (`tuners/lora/layer.py`): linear layers, embeddings and heads, modules and
biases that are stored whole, longer vocabularies.  A tied model whose embedding or head alone was changed comes out
with both.  What would change the weights in another way (DoRA, PiSSA, repeated layers) is an error, see `lora_config`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from surgery import tokenizer
from surgery.containers import open_tensors
from surgery.errors import ConfigError, FileError, show, some
from surgery.formats.base import Checkpoint
from surgery.formats.hf.table import table
from surgery.formats.table import Table
from surgery.formats.topology import ONE_RANK, Rank
from surgery.formats.weave import gather
from surgery.merging.lora_config import MERGE, LoraConfig, locate_adapter, read_lora
from surgery.merging.view import hf_family, view
from surgery.model.spec import Spec
from surgery.tensors.lazy import Box, Lazy, Same

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."
TURNED = ("gpt2",)  # families whose linear layers store their weights the other way round (Conv1D)
_LOW_RANK = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(\.weight)?")
_WHOLE = re.compile(r"(.+?)(?:\.modules_to_save(?:\.default)?)?\.(weight|bias)")
_BASE = re.compile(r"(.+)\.base_layer\.(weight|bias)")


class LowRank(Lazy):
    """`src` + scale * b a, in fp32 (fp64 for fp64), rounded once to the dtype of `src`."""

    __slots__ = ("a", "b", "dtype", "scale", "shape", "src", "turned")

    def __init__(self, src: Lazy, a: Lazy, b: Lazy, scale: float, turned: bool) -> None:
        self.src, self.a, self.b, self.scale, self.turned = src, a, b, scale, turned
        self.shape, self.dtype = src.shape, src.dtype

    def sources(self) -> tuple[Lazy, ...]:
        return (self.src, self.a, self.b)

    def read(self, box: Box) -> torch.Tensor:
        import torch

        wide = torch.float64 if self.dtype == "float64" else torch.float32
        rows, columns = (box[1], box[0]) if self.turned else box
        rank = (0, self.a.shape[0])
        delta = self.b.read((rows, rank)).to(wide) @ self.a.read((rank, columns)).to(wide)
        delta = delta.T if self.turned else delta
        return (self.src.read(box).to(wide) + delta * self.scale).to(self.torch_dtype)


@dataclass
class _Stored:
    """The adapter's tensors by module: a and b, whole tensors by name, and the base's own that peft stores beside."""

    low: dict[str, dict[str, Lazy]] = field(default_factory=dict)
    whole: dict[str, Lazy] = field(default_factory=dict)
    base: dict[str, Lazy] = field(default_factory=dict)
    embedded: set[str] = field(default_factory=set)  # modules whose a and b are an embedding's

    def modules(self) -> set[str]:
        return {*self.low, *(name.rpartition(".")[0] for name in (*self.whole, *self.base))}


def with_adapter(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The model with a LoRA adapter merged into it.  Raises SurgeryError naming what is not understood."""
    folder = locate_adapter(folder)
    config = read_lora(folder)
    names = [n for n in ("adapter_model.safetensors", "adapter_model.bin") if (folder / n).is_file()]
    if not names:
        raise FileError("holds no adapter_model.safetensors", file=folder)
    stored = _read(open_tensors(folder / names[0]), folder)
    rows = table(hf_family(checkpoint), [f"{module}.weight" for module in stored.modules()])
    tensors = view(checkpoint, rows)
    _check_modules(stored, tensors, config, _module(rows, "lm_head"))
    tied = _untie(checkpoint, tensors, stored, rows, config)
    tensors |= stored.whole
    for module, pair in stored.low.items():
        turned = module in stored.embedded or (hf_family(checkpoint) in TURNED and module != _module(rows, "lm_head"))
        tensors[f"{module}.weight"] = _low_rank(tensors[f"{module}.weight"], pair, module, turned, config)
    spec = _resized(checkpoint, tensors, rows).replace(tied=tied)
    parts = gather(rows, {Rank(): tensors}, spec, ONE_RANK).parts
    found = tokenizer.find(folder) if spec.vocab != checkpoint.spec.vocab else None
    files = (*checkpoint.files, folder / names[0])
    return replace(checkpoint, spec=spec, parts=parts, files=files, tokenizer=found or checkpoint.tokenizer)


def _read(tensors: Mapping[str, Lazy], folder: Path) -> _Stored:
    """What is stored, by what it does.  Raises ConfigError naming all that is not understood, or there twice."""
    out, odd = _Stored(), []
    for full, tensor in tensors.items():
        name = full.removeprefix(PREFIX)
        if name == full:
            odd.append(full)
        elif match := _LOW_RANK.fullmatch(name):
            module, embedding, letter, weight = match.groups()
            pair = out.low.setdefault(module, {})
            if letter in pair or bool(embedding) == bool(weight) or len(tensor.shape) != 2:
                odd.append(full)
            pair[letter] = tensor
            out.embedded |= {module} if embedding else set()
        elif match := _BASE.fullmatch(name):
            out.base[f"{match[1]}.{match[2]}"] = tensor
        elif ".original_module." in name:  # peft's copy of what a whole module replaces
            continue
        elif match := _WHOLE.fullmatch(name):  # of what was resized, peft stores both spellings
            target = f"{match[1]}.{match[2]}"
            out.whole[target] = Same((out.whole[target], tensor), full) if target in out.whole else tensor
        else:
            odd.append(full)
    odd += [f"{module}.lora_{'B' if 'A' in pair else 'A'}, which is missing" for module, pair in out.low.items()
            if len(pair) != 2]  # fmt: skip
    if odd:
        raise ConfigError(f"the adapter holds what is not understood: {some(sorted(odd))}", file=folder, hint=MERGE)
    return out


def _module(rows: Table, part: str) -> str:
    """The module that holds the embedding or the head."""
    name = next((r.name for r in rows.rows if r.parts == (part,) and not r.optional), "")
    return name.removesuffix(".weight")


def _check_modules(stored: _Stored, tensors: Mapping[str, Lazy], config: LoraConfig, head: str) -> None:
    """Raise ConfigError unless what is stored is what peft would apply, to modules that the model has."""
    modules = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")} | {head}
    wrong = [f"{show(m)}, which the model does not have" for m in sorted(stored.modules() - modules)]
    wrong += [f"{show(m)}, which target_modules leaves out" for m in stored.low
              if m in modules and not config.targets(m, m == head) and not (config.tied and m == head)]  # fmt: skip
    for name in stored.whole:
        module, _, kind = name.rpartition(".")
        kept = (config.tied and module == head) or config.saves(module)
        if module in modules and not kept and (kind != "bias" or config.biases == "none"):
            wrong.append(f"{show(name)}, which modules_to_save does not name")
    if wrong:
        raise ConfigError(f"the adapter changes {some(wrong)}", file=config.file, hint=MERGE)
    if config.drawn:
        drawn = [m for m in sorted(modules - stored.low.keys() - {head}) if len(tensors[f"{m}.weight"].shape) == 2
                 and config.targets(m)]  # fmt: skip
        if drawn:
            what = f"init_lora_weights is false, and nothing is stored of {some(drawn)}, which peft draws at random"
            raise ConfigError(what, file=config.file, hint=MERGE)


def _untie(checkpoint: Checkpoint, tensors: dict[str, Lazy], stored: _Stored, rows: Table, config: LoraConfig) -> bool:
    """Put the base's own tensors in place; whether the head still is the embedding.

    One tensor until now, both are in `tensors` afterwards unless they stay one, as `ensure_weight_tying` says.
    """
    embed, head = _module(rows, "embed"), _module(rows, "lm_head")
    tensors |= stored.base
    if not checkpoint.spec.tied:
        return False
    changed = {embed, head} & stored.modules()
    shared = stored.base.get(f"{embed}.weight") or stored.base.get(f"{head}.weight") or tensors[f"{embed}.weight"]
    if changed:
        tensors[f"{embed}.weight"] = shared
        tensors[f"{head}.weight"] = shared
    stays = not changed or (config.tied and embed in stored.modules())
    if changed and stays:  # the head's own are the embedding's once more
        stored.low.pop(head, None)
        stored.whole.pop(f"{head}.weight", None)
        tensors.pop(f"{head}.weight")
    return stays


def _low_rank(src: Lazy, pair: Mapping[str, Lazy], module: str, turned: bool, config: LoraConfig) -> LowRank:
    """One module's change."""
    a, b = pair["A"], pair["B"]
    shape = (b.shape[0], a.shape[1])
    if not a.shape[0] or a.shape[0] != b.shape[1] or (shape[::-1] if turned else shape) != src.shape:
        raise ConfigError(f"the adapter of {module} is {list(b.shape)} x {list(a.shape)}, the weight {list(src.shape)}",
                          file=config.file)  # fmt: skip
    return LowRank(src, a, b, config.scale(module, a.shape[0]), turned)


def _resized(checkpoint: Checkpoint, tensors: Mapping[str, Lazy], rows: Table) -> Spec:
    """The spec with the vocabulary of the adapter's embedding and head.  Raises ConfigError where they disagree."""
    spec = checkpoint.spec
    found = {n: tensors[n].shape[0] for p in ("embed", "lm_head") if (n := f"{_module(rows, p)}.weight") in tensors
             and tensors[n].shape}  # fmt: skip
    if len(counts := set(found.values())) > 1:
        said = " and ".join(f"{count} in {name}" for name, count in found.items())
        raise ConfigError(f"the adapter makes another vocabulary, of {said} rows", file=checkpoint.path)
    (count,) = counts
    return spec if count == spec.vocab else spec.replace(vocab=count, true_vocab=None)
