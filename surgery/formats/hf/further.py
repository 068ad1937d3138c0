"""Layers that predict further tokens (multi-token prediction): read past, named as left out, and not written.

    further({"num_nextn_predict_layers": 1, "num_hidden_layers": 46})[0][0]     # "^model[.]layers[.]46[.]"

They lie behind the last layer (GLM-4.5) or in modules of their own (ERNIE 4.5).  No logit of the next token depends on
them, and transformers passes over them (`_keys_to_ignore_on_load_unexpected` in `modeling_glm4_moe.py` and
`modeling_ernie4_5_moe.py`).  An output has none, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEYS = ("num_nextn_predict_layers", "num_mtp_layers")
_WHY = "of a layer that predicts further tokens, on which no logit of the next one depends"


def further(config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Patterns of the tensors' names, each with the reason why they are left out."""
    layers, more = config.get("num_hidden_layers"), config.get(KEYS[0])
    behind = range(layers, layers + more) if type(layers) is int and type(more) is int and 0 < more <= 8 else ()
    modules = [(r"^model\.mtp_\w+\.\d+\.", _WHY)] if config.get("model_type") == "ernie4_5_moe" else []
    return (*((f"^model[.]layers[.]{i}[.]", _WHY) for i in behind), *modules)


def without(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that claims no such layers."""
    return {k: 0 if k in KEYS and v else v for k, v in config.items()}
