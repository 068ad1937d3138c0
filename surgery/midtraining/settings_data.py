"""What a run learns from, and what it minimises: the sections `data` and `objective` of its YAML."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from surgery.data.strict import Real
from surgery.midtraining.sections import Names, Positive, Section


class Dialogue(Section):
    """Files of conversations, of prompts with completions, or of preferences."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    """What it is called in logs."""
    paths: Names
    """Files, folders or patterns, also of addresses: .jsonl, .json of lines, .parquet."""
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
    """A folder that `surgery data plan` made, or an address of one."""
    mixture: str | None = None
    """A mixture's YAML; its plan is made in the run's folder."""
    recorded: str | None = None
    """An .npz with the exact batches of another trainer's run, or an address of one."""
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
