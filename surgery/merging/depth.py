"""Keys of a config.json that tell layers apart, for a merge whose layers are not its donor's.

fitted(config, [(config, 0), (config, 1), (config, 0)])["layer_types"]      # of three layers

Lists with an entry per layer (`layer_types`, `no_rope_layers`) and lists of layers (`mlp_only_layers`) follow; where
a file leaves such a list to whatever reads it, as older ones do, `stated` writes it out first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Config = Mapping[str, Any]
Origins = Sequence[tuple[Config, int]]  # of every layer: the config of the model that it is from, and its number there
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
NUMBERS = ("mlp_only_layers",)  # lists of layers
TEXT = "text_config"  # where models of several parts describe their language model


def layers_of(config: Config) -> int:
    """How many layers a config states, by itself or for its language model; 0 if it does not."""
    for section in (config, config.get(TEXT)):
        for key in COUNTS:
            if isinstance(section, Mapping) and type(section.get(key)) is int:
                return int(section[key])
    return 0


def stated(config: Config, understood: Config) -> dict[str, Any]:
    """The config with the lists by layer that a program derives where there are none: by the layers' old numbers."""
    out, layers = dict(config), layers_of(config)
    for key, value in understood.items():
        if key == TEXT and isinstance(value, Mapping) and isinstance(config.get(TEXT), Mapping):
            out[key] = stated(config[TEXT], value)
        elif config.get(key) is None and _per_layer(key, value, layers):
            out[key] = value
    return out


def fitted(config: Config, origins: Origins) -> dict[str, Any]:
    """The donor's config with the layers of the merge."""
    old, new = layers_of(config), len(origins)
    if all(theirs is config and i == at for at, (theirs, i) in enumerate(origins)) and old == new:
        return dict(config)
    out: dict[str, Any] = {}
    for key, value in config.items():
        if key in COUNTS:
            out[key] = new
        elif key == TEXT and isinstance(value, Mapping) and not any(c in config for c in COUNTS):
            out[key] = fitted(value, [(_section(theirs, value), i) for theirs, i in origins])
        elif key in NUMBERS and isinstance(value, list):
            out[key] = [at for at, (theirs, i) in enumerate(origins) if i in (theirs.get(key) or ())]
        elif _per_layer(key, value, old):
            out[key] = [_entry(key, theirs, i, value) for theirs, i in origins]
        else:
            out[key] = value
    return out


def _section(config: Config, otherwise: Config) -> Config:
    found = config.get(TEXT)
    return found if isinstance(found, Mapping) else otherwise


def _per_layer(key: str, value: Any, layers: int) -> bool:
    return ("layer" in key or key.endswith("_types")) and isinstance(value, list) and len(value) == layers


def _entry(key: str, config: Config, layer: int, donors: Sequence[Any]) -> Any:
    """What a layer's own model says of it, else the donor of the layer of this number."""
    own = config.get(key)
    return own[layer] if isinstance(own, list) and layer < len(own) else donors[min(layer, len(donors) - 1)]
