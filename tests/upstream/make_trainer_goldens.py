"""Small checkpoints of transformers' own Trainer after two updates, with the weights that it comes to after five.

    .venv/bin/python -m tests.upstream.make_trainer_goldens FOLDER

The same functions go on from any folder: `tests/test_optimizer_hf.py` compares what comes of ours.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests import tiny

SMALL = {"l": 2, "h": 24, "v": 128, "g": 2, "n": 2, "f": 40, "e": 4, "m": 16}
FAMILIES = {"hf-llama": "llama", "hf-qwen3_moe": "qwen3_moe"}
KEPT = ("config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


class Rows(torch.utils.data.Dataset):
    """Twenty rows of random ids."""

    def __init__(self) -> None:
        self.ids = torch.randint(0, SMALL["v"], (20, 12), generator=torch.Generator().manual_seed(11))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def train(family: str, folder: Path, start: Path | None = None, rows: Rows | None = None) -> dict[str, torch.Tensor]:
    """The weights after five updates, with a checkpoint after two; `start` is what it resumes from.

    The model is loaded from there too: a Trainer of transformers 5.23 finds no experts in files, and says nothing.
    """
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(start, attn_implementation="eager") if start else None
    model = (model or tiny.model(family, **SMALL)).train()
    said = TrainingArguments(
        output_dir=str(folder), max_steps=5, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-3,
        weight_decay=0.1, adam_beta2=0.95, warmup_steps=1, lr_scheduler_type="cosine", report_to=[], seed=3,
        use_cpu=True, disable_tqdm=True, logging_steps=1, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model, said, train_dataset=rows or Rows()).train(resume_from_checkpoint=str(start) if start else None)
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def main() -> None:
    for name, family in FAMILIES.items():
        with tempfile.TemporaryDirectory() as tmp:
            train(family, Path(tmp))
            home = Path(sys.argv[1]) / name
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir(parents=True)
            for file in KEPT:
                shutil.copy(Path(tmp) / "checkpoint-2" / file, home / file)
            count = sum(t.numel() for t in load_file(home / "model.safetensors").values())
            print(name, count, sum(p.stat().st_size for p in home.iterdir()))


if __name__ == "__main__":
    main()
