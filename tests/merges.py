"""mergekit as the oracle of merges: tiny models that differ a little, merged by mergekit's own code in this process.

a, b, c = merges.models("qwen2", folder, 3, "bfloat16")
merges.mergekit({"merge_method": "linear", "models": [...]}, folder / "theirs")
merges.differences(folder / "ours", folder / "theirs")          # [] if every tensor has the same bits
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from tests import oracle, tiny

SMALL = {"l": 2, "h": 60, "v": 72, "g": 2, "n": 3, "half": 5, "f": 84, "e": 4, "m": 28}


def disturb(folder: Path, seed: int, amount: float = 0.05) -> None:
    """Add seeded noise to every weight of a Hugging Face folder; a tenth of the elements stay as they are."""
    path = folder / "model.safetensors"
    tensors, generator = load_file(path), torch.Generator().manual_seed(seed)
    for name in sorted(tensors):
        noise = torch.randn(tensors[name].shape, generator=generator)
        noise *= torch.rand(noise.shape, generator=generator) > 0.1
        tensors[name] = (tensors[name].float() + amount * noise).to(tensors[name].dtype)
    save_file(tensors, path, {"format": "pt"})


def models(family: str, folder: Path, count: int, dtype: str = "bfloat16", **changes: Any) -> list[str]:
    """Folders of a model and of `count - 1` disturbed copies."""
    sizes = {**SMALL, **tiny.WIDER, "h": 52} if tiny.FAMILIES[family][1] else SMALL
    made = []
    for i in range(count):
        out = tiny.save(family, folder / f"{family}-{dtype}-{i}", dtype, **{**sizes, **changes})
        if i:
            disturb(out, i)
        made.append(str(out))
    return made


def mergekit(config: Mapping[str, Any], out: Path, **options: Any) -> Path:
    """Merge with mergekit itself; the models, which it keeps in a set, come in the order of the file."""
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    text = json.dumps(config)

    class Ordered(MergeConfiguration):
        def referenced_models(self) -> list[Any]:
            first = [self.base_model] if self.base_model else []
            return first + sorted(set(super().referenced_models()) - set(first), key=lambda m: text.index(str(m.model)))

    LoaderCache.loaders.clear()  # models by name, of earlier tests
    logging.getLogger("mergekit").setLevel(logging.CRITICAL)
    known = {"quiet": True, "write_model_card": False, "copy_tokenizer": False, "random_seed": 0, **options}
    run_merge(Ordered.model_validate(dict(config)), str(out), MergeOptions(**known))
    return out


@contextmanager
def ties_by_place() -> Iterator[None]:
    """torch's sorts, of which mergekit uses the unstable ones, made stable: of equal values the first comes first."""
    sort, argsort = torch.sort, torch.argsort

    def topk(values: torch.Tensor, k: int, largest: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        found = sort(values, descending=largest, stable=True)
        return found.values[:k], found.indices[:k]

    def stable(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, dim=-1, descending=False: original(x, dim=dim, descending=descending, stable=True)

    patched = {"torch.sort": stable(sort), "torch.argsort": stable(argsort), "torch.topk": topk}
    with ExitStack() as stack:
        for name, function in patched.items():
            stack.enter_context(mock.patch(name, function))
        yield


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    """All tensors of a folder; experts stacked under the names that transformers 5 has in memory, as mergekit's."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(path)
    pattern = r"(.*layers\.\d+\.)(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(\w+)\.weight"
    groups: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
    for name in [n for n in found if re.fullmatch(pattern, n)]:
        match = re.fullmatch(pattern, name)
        assert match is not None
        groups.setdefault(match[1], {})[int(match[2]), match[3]] = found.pop(name)
    for layer, own in groups.items():
        count = 1 + max(i for i, _ in own)
        gate, up, down = ("w1", "w3", "w2") if (0, "w1") in own else ("gate_proj", "up_proj", "down_proj")
        found[layer + "mlp.experts.gate_up_proj"] = torch.stack(
            [torch.cat([own[i, gate], own[i, up]]) for i in range(count)]
        )
        found[layer + "mlp.experts.down_proj"] = torch.stack([own[i, down] for i in range(count)])
    return {n.replace("block_sparse_moe.gate", "mlp.gate"): t for n, t in found.items()}


def differences(ours: Path | str, theirs: Path | str, cast: torch.dtype | None = None) -> list[str]:
    """Names of tensors that are not the same, bit for bit; `cast` rounds those of `theirs` first."""
    a, b = weights(ours), weights(theirs)
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    assert a
    return [n for n in a if not oracle.same_bits(a[n], b[n] if cast is None else b[n].to(cast))]
