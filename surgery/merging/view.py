"""Models as mergekit sees them: tensors under Hugging Face's names, experts stacked as transformers 5 has them.

    tensors = view(checkpoint, hf_table(checkpoint))
    tensors["model.layers.0.mlp.up_proj.weight"]

So filters, norms and thresholds mean the same.  Any format gets there and back through Hugging Face's table.
"""

from __future__ import annotations

from collections.abc import Mapping

from surgery.formats.base import Checkpoint
from surgery.formats.hf.config import choose_family
from surgery.formats.hf.table import table
from surgery.formats.table import Table
from surgery.formats.topology import ONE_RANK, Rank
from surgery.formats.weave import Stored, spread
from surgery.tensors.lazy import Lazy

STACKED = ("model.layers.0.mlp.experts.gate_up_proj",)


def hf_family(checkpoint: Checkpoint) -> str:
    """The model_type under which a model is merged."""
    return checkpoint.spec.family if checkpoint.format == "hf" else choose_family(checkpoint.spec)


def hf_table(checkpoint: Checkpoint) -> Table:
    """The table of that family, experts stacked."""
    return table(hf_family(checkpoint), STACKED if checkpoint.spec.experts else ())


def view(checkpoint: Checkpoint, rows: Table) -> dict[str, Lazy]:
    """The tensors of a checkpoint under Hugging Face's names."""
    stored: Mapping[str, Stored] = spread(rows, checkpoint.parts, checkpoint.spec, ONE_RANK)[Rank()]
    return {name: s.tensor for name, s in stored.items()}
