"""transformers' own Trainer beside the loop: the same rates, gradient norms and last weights, for every family."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from surgery.midtraining.export import export
from surgery.midtraining.loop import fresh_state, prepare, train
from surgery.midtraining.run_file import make_run
from tests import tiny

SMALL = {"l": 4, "h": 24, "v": 128, "g": 2, "n": 2, "f": 40, "e": 4, "m": 16}
MORE: dict[str, dict[str, Any]] = {
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},  # the default is 0.1
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"] * 2},
}
STEPS, RATE = 8, 2e-3
# the Trainer's words for a schedule, and ours
SCHEDULES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("linear", {}, {"name": "linear"}),
    ("cosine", {}, {"name": "cosine"}),
    ("constant_with_warmup", {}, {"name": "constant"}),
    ("warmup_stable_decay", {"num_decay_steps": 4}, {"name": "wsd", "decay": 4}),
    ("warmup_stable_decay", {"num_decay_steps": 4, "decay_type": "1-sqrt", "min_lr_ratio": 0.1},
     {"name": "wsd", "decay": 4, "decay_shape": "sqrt", "final_lr": "10%", "warmup_from": "10%"}),
    ("inverse_sqrt", {}, {"name": "inverse_sqrt"}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}, {"name": "cosine", "final_lr": "10%"}),
]  # fmt: skip
SAMPLE = ("ernie4_5_moe", "olmo3", "qwen2")  # a selection bias, two kinds of layers, tied


class InOrder(Trainer):
    """A Trainer that takes rows in the order that they have."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def draw(number: int) -> SimpleNamespace:
    """A way to train: every number another one."""
    schedule, arguments, ours = SCHEDULES[number % len(SCHEDULES)]
    return SimpleNamespace(
        micro=1 + number % 3, accumulated=1 + number // 3 % 3, length=(11, 16, 24)[number % 3],
        clip=(0.5, 10.0)[number % 2], beta2=(0.95, 0.999)[number // 2 % 2], decay=(0.1, 0.0)[number // 3 % 2],
        masked=number % 2 == 0, packed=number // 2 % 2 == 0, schedule=schedule, arguments=arguments, ours=ours,
    )  # fmt: skip


def rows(way: SimpleNamespace) -> dict[str, torch.Tensor]:
    """What is trained on, [steps * accumulated * micro, length] each."""
    generator = torch.Generator().manual_seed(5)
    shape = (STEPS * way.accumulated * way.micro, way.length)
    ids = torch.randint(1, SMALL["v"], shape, generator=generator)
    out = {"input_ids": ids, "labels": ids.clone()}
    if way.masked:
        out["labels"][torch.rand(shape, generator=generator) < 0.3] = -100
    if way.packed:
        begins = torch.rand(shape, generator=generator) < 0.2
        begins[:, 0] = True
        at = torch.arange(way.length).expand(shape)
        out["position_ids"] = at - torch.where(begins, at, 0).cummax(1).values
    return out


def theirs(init: Path, way: SimpleNamespace, data: dict[str, torch.Tensor], out: Path) -> tuple[list[Any], Any]:
    """The Trainer's log of every step, and the weights that it came to."""
    model = AutoModelForCausalLM.from_pretrained(init, attn_implementation="sdpa")
    said = TrainingArguments(
        output_dir=str(out), max_steps=STEPS, save_strategy="no", per_device_train_batch_size=way.micro,
        gradient_accumulation_steps=way.accumulated, learning_rate=RATE, weight_decay=way.decay, adam_beta2=way.beta2,
        warmup_steps=3, lr_scheduler_type=way.schedule, lr_scheduler_kwargs=way.arguments, max_grad_norm=way.clip,
        report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = InOrder(
        model, said, train_dataset=[dict(zip(data, row, strict=True)) for row in zip(*data.values(), strict=True)]
    )
    trainer.train()
    model.save_pretrained(out / "last")
    return [line for line in trainer.state.log_history if "grad_norm" in line], load_file(
        out / "last/model.safetensors"
    )


def ours(init: Path, way: SimpleNamespace, data: dict[str, torch.Tensor], out: Path) -> tuple[list[Any], Any]:
    """The same of the loop, told by the settings of a run."""
    shape = (STEPS, way.accumulated, way.micro, way.length)
    out.mkdir()
    np.savez(out / "batches.npz", **{name: value.reshape(shape).numpy() for name, value in data.items()})
    config = AutoModelForCausalLM.from_pretrained(init).config
    balance = config.router_aux_loss_coef if getattr(config, "output_router_logits", False) else 0.0
    job = prepare(make_run({
        "model": {"path": str(init), "experts": "loop"}, "output": str(out), "init": {"optimizer": "fresh"},
        "data": {"recorded": str(out / "batches.npz"), "attend_across_documents": not way.packed},
        "train": {"convention": "hf", "micro_batch": way.micro, "clip_norm": way.clip, "precision": "fp32",
                  "schedule": {**way.ours, "start_lr": RATE, "warmup": 3},
                  "optimizer": {"betas": [0.9, way.beta2], "weight_decay": way.decay}},
        "moe": {"balance": balance}, "device": "cpu",
    }))  # fmt: skip
    lines: list[Any] = []
    log = SimpleNamespace(step=lambda metrics, times: lines.append(metrics), routing=lambda *_: None,
                          event=lambda *_: None)  # fmt: skip
    train(job, fresh_state(job), log)
    export(job, job.run.export[0], out / "export")
    return lines, load_file(out / "export/model.safetensors")


def moved(name: str, weight: torch.Tensor) -> torch.Tensor:
    """A weight without what only rounding moves: a key's bias that no position turns changes no softmax."""
    if name.endswith("query_key_value.bias"):
        return weight.view(SMALL["g"] * SMALL["n"], 3, -1)[:, ::2]
    return weight.view(3, -1)[::2] if name.endswith("c_attn.bias") else weight


@pytest.mark.slow
@pytest.mark.parametrize(("number", "family"), [
    pytest.param(n, f, marks=() if f in SAMPLE else pytest.mark.thorough) for n, f in enumerate(tiny.FAMILIES)
])  # fmt: skip
def test_the_trainer_comes_to_the_same_weights(number, family, tmp_path):
    torch.set_num_threads(1)
    model, init, way = tiny.model(family, **SMALL, **MORE.get(family, {})), tmp_path / "init", draw(number)
    if hasattr(model.config, "router_aux_loss_coef"):
        model.config.output_router_logits = True
    model.save_pretrained(init)
    data = rows(way)
    (log, want), (lines, got) = theirs(init, way, data, tmp_path / "hf"), ours(init, way, data, tmp_path / "ours")
    assert [line["lr"] for line in lines] == pytest.approx([line["learning_rate"] for line in log], rel=1e-9)
    if family != "gpt2":  # whose loss Trainer divides by all labels, a row's first ones too; Adam does not see that
        norms = [line["grad_norm"] for line in log]
        assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=2e-5)
    assert got.keys() == want.keys()
    far = {name: float((moved(name, got[name]) - moved(name, want[name])).abs().max()) / RATE for name in want}
    assert {name: x for name, x in far.items() if x > 0.05} == {}  # of a step: AdamW makes full ones of rounding
