"""Write a tiny model with random weights, as transformers saves it: what the small twins of the recipes begin with.

    python recipes/tiny_model.py tiny/ --tokenizer corpus/tokenizer
    python recipes/tiny_model.py tiny/ --tokenizer corpus/tokenizer --family olmoe num_experts=8 rope_theta=1e6

The family is a `model_type` of transformers; NAME=VALUE sets fields of its config.  The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False}  # fmt: skip


def config_of(family: str, tokenizer: Path, fields: dict[str, Any]) -> Any:
    """The config of a tiny model of a family, whose vocabulary is the tokenizer's."""
    known = json.loads((tokenizer / "tokenizer.json").read_bytes())
    ids = {t["id"] for t in known["added_tokens"]} | set(known["model"]["vocab"].values())
    end = next((t["id"] for t in known["added_tokens"]), None)
    special = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": None}
    return AutoConfig.for_model(family, **{**SIZES, **special, "vocab_size": max(ids) + 1, **fields})


def field(text: str) -> tuple[str, Any]:
    """rope_theta=1e6 -> ("rope_theta", 1000000.0); what is no JSON is a text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("fields", type=field, nargs="*", metavar="NAME=VALUE")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with a tokenizer.json")
    parser.add_argument("--family", default="llama")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_intermixed_args()
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config_of(args.family, args.tokenizer, dict(args.fields)))
    model.to(torch.bfloat16).save_pretrained(args.folder)
    for path in args.tokenizer.iterdir():
        shutil.copy(path, args.folder)
    print(f"{args.family}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")


if __name__ == "__main__":
    main()
