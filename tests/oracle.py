"""What upstream computes and stores, found without any code of surgery: the other side of every comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"


def case(name: str) -> dict[str, Any]:
    """The case.json of a golden checkpoint: how to read it, how to write it, what to leave out of the comparison."""
    return dict(json.loads((GOLDEN / name / "case.json").read_text()))


def hf_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a Hugging Face folder by transformers, fp32, eager attention."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(ids.long()).logits.float()


def expected(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and logits that the upstream program computed for a golden checkpoint."""
    stored = load_file(GOLDEN / name / "expected.safetensors")
    return stored["input_ids"].long(), stored["logits"].float()


def gap(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference of logits, in standard deviations, over the rows that both vocabularies have."""
    rows = min(got.shape[-1], want.shape[-1])
    return float((got[..., :rows] - want[..., :rows]).abs().max() / want[..., :rows].std())


def flat(tree: Any, at: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a nested state dict, by its path."""
    if isinstance(tree, torch.Tensor):
        return {at: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {path: t for key, value in items for path, t in flat(value, f"{at}/{key}").items()}


def torch_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a torch file, by torch itself."""
    return flat(torch.load(path, map_location="cpu", weights_only=True))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
