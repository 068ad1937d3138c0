"""Reads with Megatron-core what surgery wrote, and samples it as Megatron does.

.cache/upstream/megatron-core/bin/python tests/upstream/load_megatron_data.py CASES.json OUT.json

CASES: a list of {data: [weight, prefix, ...] or [prefix, ...], samples, sequence_length, seed, split}.
OUT: the documents of every prefix, and of every case the number of samples and the tokens of the first ones.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

SHOWN = 20


class Tokenizer:
    """As much of one as the datasets ask for; the pad id is none of the data's."""

    vocab_size, eod, eos, pad = 1000, 0, 0, 999
    special_tokens_dict = {"pad_token": 999}  # noqa: RUF012
    unique_identifiers = {"class": "Tiny"}  # noqa: RUF012


def documents(prefix: str) -> list[list[int]]:
    held = IndexedDataset(prefix)
    return [held.get(i).tolist() for i in range(len(held.sequence_lengths))]


def run(case: dict, cache: Path) -> dict:
    data = case["data"]
    weighted = not isinstance(data[0], str)
    blend = (data[1::2], data[0::2]) if weighted else (data, None)
    config = GPTDatasetConfig(
        random_seed=case["seed"], sequence_length=case["sequence_length"], blend=blend, split=case["split"],
        path_to_cache=str(cache), tokenizer=Tokenizer(), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False, mmap_bin_files=True, num_dataset_builder_threads=1,
    )  # fmt: skip
    made, *_ = BlendedMegatronDatasetBuilder(GPTDataset, [case["samples"], 0, 0], lambda: True, config).build()
    return {"samples": len(made), "tokens": [made[i]["tokens"].tolist() for i in range(min(SHOWN, len(made)))]}


def main(cases: str, out: str) -> None:
    held = json.loads(Path(cases).read_text())
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}.store", rank=0, world_size=1)
    prefixes = sorted({p for case in held for p in case["data"] if isinstance(p, str)})
    found = {"documents": {p: documents(p) for p in prefixes}, "cases": [run(c, Path(f"{out}.cache")) for c in held]}
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
