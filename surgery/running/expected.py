"""Would transformers load a folder?  Its config is opened, its class built on `meta`, the tensors' names compared.

    problems("merged")                  # ("no lm_head.weight",), or () if every tensor has its place
    check_loads(Path("merged"), donor=Path("base"))

No weight is read and no code of the folder is run.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from surgery.containers.text import read_json
from surgery.errors import LayoutError, some
from surgery.formats.hf.rope import CLASSIC as ROPE
from surgery.formats.hf.rope import both_spellings
from surgery.running.loading import explained, own_classes, quiet


def check_loads(folder: Path, donor: Path | None = None) -> str:
    """A note if transformers has no class for the folder, else "".

    Raises ConfigError if transformers refuses the config, LayoutError if tensors are missing, have other shapes or
    have no place, unless it is the same with `donor`, which the folder was made after.
    """
    config = read_json(folder / "config.json", "config.json")
    with quiet():
        chosen = _class_of(config)
    if chosen is None:
        kind = config.get("model_type") if isinstance(config, dict) else None
        return f"not loaded for a try: transformers has no class for a {kind} by itself"
    wrong = [p for p in problems(folder) if donor is None or p not in problems(donor)]
    if wrong:
        raise LayoutError(f"transformers would not load all of it: {some(wrong)}", file=folder)
    return ""


def readable(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the rope's classic keys as well, for programs that know no others; as it is where transformers
    would make another config of it."""
    both = both_spellings(config)
    one, other = understood(config), understood(both)
    return both if one and other and _without(one, ROPE) == _without(other, ROPE) else config


def understood(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers makes of a config, with all that it derives; nothing of a family that it does not know."""
    from transformers import AutoConfig

    with quiet():
        try:
            found: dict[str, Any] = AutoConfig.for_model(**copy.deepcopy(dict(config))).to_dict()
        except Exception:  # whatever it raises on such a family
            return {}
    return found


def _without(config: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {k: _without(v, keys) if isinstance(v, dict) else v for k, v in config.items() if k not in keys}


def problems(folder: str | Path) -> tuple[str, ...]:
    """What transformers misses, and what it finds no place for."""
    chosen = _class_of(read_json(Path(folder) / "config.json", "config.json"))
    assert chosen is not None
    with explained("transformers cannot load the model", Path(folder)), quiet():
        _, told = chosen.from_pretrained(folder, device_map={"": "meta"}, output_loading_info=True,
                                         local_files_only=True)  # fmt: skip
    out = [f"no {name}" for name in told["missing_keys"]]
    out += [f"no place for {name}" for name in told["unexpected_keys"]]
    out += [f"another shape of {key[0] if isinstance(key, tuple) else key}" for key in told["mismatched_keys"]]
    return tuple(sorted(out))


def _class_of(config: Any) -> Any:
    """transformers' class (or ours) by the first of `architectures`; None if there is none."""
    import transformers

    names = config.get("architectures") if isinstance(config, dict) else None
    if own := own_classes(str(config.get("model_type")) if isinstance(config, dict) else ""):
        return own.model
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    found = getattr(transformers, name, None) if name.isidentifier() else None
    return found if hasattr(found, "from_pretrained") else None
