"""Tied models whose head is stored in another way than usual: alone, or with values of its own.

    config, tensors, notes = settled(config, tensors, table, "auto", "config.json")

`safetensors.torch.save_model` keeps one of two tensors that share memory, and that may be the head.  A head that
differs from the embedding it is tied to is what trainers leave that had parted the two: transformers 5 loads it and
unties them, transformers 4 drops it, so that the files alone do not say what the model is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.errors import AmbiguousError
from surgery.formats.table import Table
from surgery.tensors.extent import look_equal
from surgery.tensors.lazy import Lazy

Config = Mapping[str, Any]
BESIDE = " beside the embedding"  # how a head is called that is left out


def settled(
    config: Config, tensors: Mapping[str, Lazy], table: Table, choice: str, file: str
) -> tuple[Config, dict[str, Lazy], list[str]]:
    """The config and the tensors of a tied model as they are meant, and notes.  `choice`: auto, yes, no.

    Raises AmbiguousError if a head of its own is stored and `choice` is auto.
    """
    tensors = dict(tensors)
    embedding, head = (next((r.name for r in table.rows if r.parts == (part,)), "") for part in ("embed", "lm_head"))
    if head not in tensors:
        return config, tensors, []
    if embedding not in tensors:
        tensors[embedding] = tensors.pop(head)
        return config, tensors, [f"the model is tied, and only {head} is stored: it is the embedding as well"]
    if look_equal(tensors[embedding], tensors[head]):
        return config, tensors, []
    if choice == "yes":
        tensors[head + BESIDE] = tensors.pop(head)
        return config, tensors, [f"{head} differs from the embedding and was left out (-O tied=yes)"]
    if choice == "no":
        return {**config, "tie_word_embeddings": False}, tensors, [f"{head} is the model's own head (-O tied=no)"]
    raise AmbiguousError(
        f"tie_word_embeddings is true, but {head} is stored with other values than {embedding}",
        file=file, readings=({"tied": "no"}, {"tied": "yes"}),
        hint="-O tied=no keeps this head, as transformers 5 does; -O tied=yes leaves it out, as transformers 4 does; "
             "elsewhere, set tie_word_embeddings to false, or take the tensor away",
    )  # fmt: skip
