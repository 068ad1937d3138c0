"""A mixture of sources, as a strict YAML file says it.

mixture = read_mixture("mix.yaml")
mixture.sources[0].weight, mixture.budget.tokens         # 0.5, 50_000_000_000

tokenizer: allenai/OLMo-2-1124-7B     # for text sources and `show --decode`; its hash goes into the fingerprint
sequence_length: 4096
budget: {tokens: 50B}                 # or {epochs: 2}; left out: the sum of `tokens` and `multiplier`
holdout: 0.001                        # of every source; never trained on
sources:
  - {name: web,  paths: tok/web/*.bin, weight: 0.5}              # exactly one of weight, tokens, multiplier
  - {name: math, paths: tok/math/*.npy, dtype: uint32, tokens: 10B, max_epochs: 4}
  - {name: code, paths: tok/code/*.ds, multiplier: 0.1, max_share: 0.2}
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from surgery.data.strict import Count, Real, Strict, read_model

Packing = Literal["concatenate", "best_fit", "document"]
Dtype = Literal["uint8", "uint16", "uint32", "uint64", "int16", "int32", "int64"]
Kind = Literal["auto", "megatron", "dolma", "datatrove", "npy", "datasets", "text"]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Paths = Annotated[tuple[str, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v := _listed(v), list) else v)]


def _share_or_number(value: int | float) -> int | float:
    if value > 1 and value != int(value):
        raise ValueError("give a share below 1, or a whole number of instances")
    return value


Holdout = Annotated[Count | Real, Field(ge=0), AfterValidator(_share_or_number)]


class Budget(Strict):
    """How much is trained on in all: tokens, or passes over everything."""

    tokens: Annotated[Count, Field(gt=0)] | None = None
    epochs: Annotated[Real, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if (self.tokens is None) == (self.epochs is None):
            raise ValueError("give either tokens or epochs")
        return self


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class Source(Strict):
    """Where tokens come from, and how many are wanted.

    weight         share of what the other kinds leave of the budget, relative to the other weights
    tokens         this many
    multiplier     this many times all that the source has (0.0323: a part of it; 4: four passes)
    max_epochs     at most so many passes; what is missing then goes to the sources with weights
    max_share      at most this share of the budget
    holdout        instances kept out for evaluation: a share below 1, or a number
    format, dtype  where the files do not say it themselves
    eos            the id that ends documents: looked for in files without an index of them, appended to text
    label_mask     a file for each of `paths` (in order of their names), a column of a dataset, or "none"
    text_key       the key of the text in jsonl and parquet; or
    messages_key   that of conversations, of which only the assistant's tokens are learnt; or
    prompt_key, completion_key   those of prompts and completions, which alone are learnt
    """

    name: Name
    paths: Annotated[Paths, Field(min_length=1)]
    weight: Annotated[Real, Field(gt=0)] | None = None
    tokens: Annotated[Count, Field(gt=0)] | None = None
    multiplier: Annotated[Real, Field(gt=0)] | None = None
    max_epochs: Annotated[Real, Field(gt=0)] | None = None
    max_share: Annotated[Real, Field(gt=0, le=1)] | None = None
    holdout: Holdout | None = None
    format: Kind = "auto"
    dtype: Dtype | None = None
    eos: Annotated[int, Field(ge=0)] | None = None
    label_mask: Paths | None = None
    text_key: str = "text"
    messages_key: str | None = None
    prompt_key: str | None = None
    completion_key: str | None = None

    @model_validator(mode="after")
    def _one_amount(self) -> Source:
        given = [name for name in ("weight", "tokens", "multiplier") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"{self.name} needs exactly one of weight, tokens, multiplier; it has {given or 'none'}")
        if (self.prompt_key is None) != (self.completion_key is None) or (self.prompt_key and self.messages_key):
            raise ValueError(f"{self.name}: prompt_key and completion_key go together, and exclude messages_key")
        return self


class Mixture(Strict):
    """A whole mixture.  Seeds: `seed` makes the order, `sample_seed` says which part of a source a partial pass takes.

    packing        concatenate: instances are cut from the documents as they follow one another; best_fit: documents
                   that fit are not split; document: one to an instance, cut off where it is longer
    long           what becomes of documents that packing cannot take whole: split them, or, of conversations, end
                   them after the last answer that fits (turn), of packing best_fit and document
    chat_template  a file with one, in place of the tokenizer's
    isolate        documents do not see each other: positions restart, and no first token is a label
    pad_id         fills up instances that packing leaves short; never a label
    rows_per_step  of the global batch; it can be chosen when training starts
    strict         a cap that binds is an error and no warning
    """

    sequence_length: Annotated[int, Field(gt=1, le=1 << 24)]
    sources: Annotated[tuple[Source, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
    tokenizer: str | None = None
    vocab_size: Annotated[int, Field(gt=0)] | None = None
    budget: Budget | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    sample_seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    rows_per_step: Annotated[int, Field(gt=0)] | None = None
    packing: Packing = "concatenate"
    long: Literal["split", "turn"] = "split"
    chat_template: str | None = None
    isolate: bool = True
    pad_id: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    strict: bool = False
    holdout: Holdout = 0

    @field_validator("budget", mode="before")
    @classmethod
    def _plain_budget(cls, value: Any) -> Any:
        return value if isinstance(value, dict | Budget | None) else {"tokens": value}

    @model_validator(mode="after")
    def _names_differ(self) -> Mixture:
        names = [s.name for s in self.sources]
        if not names:
            raise ValueError("sources are missing")
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"two sources are called {', '.join(twice)}")
        return self


def read_mixture(path: str | os.PathLike[str]) -> Mixture:
    """The mixture of a YAML file.  Raises FileError if it is no YAML, ConfigError with every key that is wrong."""
    return read_model(path, Mixture, "mixture")
