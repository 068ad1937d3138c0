"""How a run is trained: the sections `train` and `moe` of its YAML."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from surgery.midtraining.amounts import Amount, ByTokens, Duration, LearningRate, Rate
from surgery.midtraining.sections import Betas, Names, Positive, Section, Share, Unsigned


class Schedule(Section):
    """The learning rate of every step; it counts from the start of this run, whatever came before."""

    name: Literal["linear", "cosine", "wsd", "constant", "inverse_sqrt"] = "linear"
    """linear and cosine fall from the end of the warm-up to the end of the run, wsd only over its last part."""
    start_lr: LearningRate | Literal["inherit"] = "inherit"
    """The rate after the warm-up; inherit: the one that the source's run had come to, as its files record it."""
    length: Duration | None = None
    """When the rate has come down, as Megatron's --lr-decay-iters; null: at the end of the run."""
    warmup: Duration = Amount(0, "steps")
    """How long the rate rises: steps, '1B tokens' or '2%' of the run."""
    warmup_from: LearningRate = Rate(0.0)
    """Where the warm-up begins: a rate, or '10%' of the peak."""
    final_lr: LearningRate = Rate(0.0)
    """Where the rate falls to: a rate, or '10%' of the peak."""
    decay: Duration = Amount(0.1, "share")
    """How long wsd falls at the end."""
    decay_shape: Literal["linear", "sqrt", "cosine", "exponential"] = "linear"
    """How wsd falls."""
    count_warmup_from: Literal[0, 1] = 1
    """The number of the first step in the warm-up: from 0, its rate is that of warmup_from."""
    count_decay_from: Literal[0, 1] = 0
    """The number of the first step in the decay: from 1, the rate of the last step is final_lr."""
    offset: Annotated[int, Field(ge=0)] = 0
    """Steps that a loaded counter is said to have done, as Megatron counts; all other numbers then count from there."""


class Optimizer(Section):
    """AdamW, in its fused form."""

    name: Literal["adamw"] = "adamw"
    """The only one."""
    betas: Betas = (0.9, 0.95)
    """How slowly the moments forget."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Unsigned = 0.1
    """Times the rate, of every parameter that decays."""
    decay: Literal["llama", "olmo", "megatron", "hf", "all"] = "llama"
    """Who decays: llama, all matrices but the embedding and routers; olmo, all but the embedding; megatron, all with
    two dimensions; hf, all but norms and biases; all."""
    no_decay: Names = ()
    """Kinds (norm, bias, embedding, head, router, matrix, vector) or patterns of names that do not decay, besides."""
    lr_scale: dict[str, Unsigned] = Field(default_factory=dict)
    """Kinds or patterns whose rate is multiplied: {router: 0.1}."""


class SkipStep(Section):
    """Leave out steps that are far from the last ones."""

    sigma: Positive | None = 6.0
    """A loss or gradient norm above mean + sigma * std of the last ones is left out; null: only what is not finite."""
    window: Annotated[int, Field(ge=4)] = 128
    """How many last ones."""
    abort_after: Annotated[int, Field(ge=1)] = 10
    """So many steps in a row that are left out end the run."""


class Train(Section):
    """How it is trained."""

    convention: Literal["surgery", "olmo_core", "olmo", "hf", "megatron"] = "surgery"
    """Preset the keys in which trainers differ: how steps are counted, what losses are divided by, who decays."""
    length: Duration | None = None
    """How long: steps or '50B tokens'; null: all that the data have."""
    batch_tokens: ByTokens | None = None
    """Tokens of a step on all devices together, or from which token on how many: {0: 1M, 2B: 4M}; null: as the data
    say."""
    micro_batch: Annotated[int, Field(gt=0)] | None = None
    """Rows that a device computes at once; null: about 16,384 tokens.  What is missing is accumulated."""
    sequence_length: ByTokens | None = None
    """Cut rows into shorter ones at first: {0: 1024, 1B: 4096}; null: as the data have them."""
    schedule: Schedule = Schedule()
    """The learning rate."""
    optimizer: Optimizer = Optimizer()
    """What moves the weights."""
    freeze: Names = ()
    """Kinds or patterns of parameters that stay as they are: [router, 'model.layers.0.*']."""
    clip_norm: Positive | None = 1.0
    """Scale the gradients to this norm where theirs is larger; null: never."""
    z_loss: Unsigned = 1e-5
    """Times the square of the logits' logsumexp, of every label."""
    loss_divisor: Literal["labels", "all_tokens"] = "labels"
    """What the step's losses are divided by: its labels that count, or all of its tokens."""
    loss_chunk: Annotated[int, Field(gt=0)] | None = None
    """Tokens whose logits are held at once; null: chosen by the vocabulary."""
    skip_step: SkipStep | None = SkipStep()
    """Leave out steps that are far from the last ones; null: never, and a loss that is not finite ends the run."""
    precision: Literal["auto", "fp32", "autocast", "bf16", "fp8"] = "auto"
    """fp32; autocast: products in bf16; bf16: what lies between them, too; fp8: autocast, with the products of linear
    layers in fp8, by torchao, on a GPU that has it.  The weights that learn are fp32 in each.
    auto: autocast where it is quicker."""
    activation_checkpointing: bool | Annotated[int, Field(gt=1)] = False
    """Compute activations again in the backward pass instead of holding them: less memory, up to a third more time; a
    number: of every n-th layer only."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile; auto: on a GPU, and on a CPU for runs of more than 20 minutes of a dense model."""
    dropout: Share = 0.0
    """Of all places where the model has dropout."""
    seed: Annotated[int, Field(ge=0)] = 0
    """For dropout, and for the tokens of the self-tests."""


class Moe(Section):
    """Losses of the routers; without effect on a dense model."""

    balance: Unsigned = 0.01
    """Times the loss that keeps the experts equally busy: per layer, 1.0 where they are."""
    router_z: Unsigned = 0.001
    """Times the square of the routers' logsumexp."""
    coefficients_of: Literal["ours", "transformers", "olmo_core", "megatron", "megablocks"] = "ours"
    """Whose coefficients balance and router_z are; they are translated, and a note says to what."""
    rule: Literal["ours", "transformers", "olmo_core", "megatron", "megablocks"] = "ours"
    """How the losses of layers and micro-batches add up; other trainers' rules repeat their runs, with their
    coefficients."""
    bias_rate: Unsigned = 0.0
    """Instead of a loss: after a step, experts that were chosen too rarely become easier to choose by this much."""
    fp32_router: bool = True
    """Routers compute in fp32 whatever the precision of the rest."""

    @model_validator(mode="after")
    def _one_meaning(self) -> Moe:
        if self.rule != "ours" and self.coefficients_of not in ("ours", self.rule):
            raise ValueError(f"with the rule of {self.rule} coefficients are {self.rule}'s: leave out coefficients_of")
        return self
