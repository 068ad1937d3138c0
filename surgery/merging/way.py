"""Which way a merge goes: through the tables of formats, by the names of tensors, or to mergekit.

chosen = way(recipe, "hf")
chosen.kind, chosen.why          # "names", "base is a 'phi3', for which there is no table"

A table knows what each tensor is, so models of any format are merged into any other.  Without one, Hugging Face folders
that agree name by name are merged as they are.  What is left (several modules, tokenizers to be aligned) is mergekit's.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

from surgery.containers.text import read_json
from surgery.errors import ConfigError, UsageError, show
from surgery.formats.hf.families import FAMILIES
from surgery.merging.by_name import Folders, agreeing
from surgery.merging.recipe import Recipe
from surgery.merging.references import model_folder

TABLE, NAMES, MERGEKIT = "table", "names", "mergekit"


@dataclass(frozen=True)
class Way:
    """`kind` is table, names or mergekit, `why` says why it is not a table, `folders` are what is merged by names."""

    kind: str
    why: str = ""
    folders: Folders = field(default_factory=dict)


def way(recipe: Recipe, to: str) -> Way:
    """How to do a merge.  Raises UsageError or ConfigError if there is no way."""
    several = recipe.modules not in ((), ("default",))
    why = f"the modules {', '.join(recipe.modules)} are known to mergekit only" if several else _no_table(recipe)
    if not why:
        return Way(TABLE)
    if to != "hf":
        raise UsageError(f"{why}, and such merges are written as Hugging Face folders only", hint="leave out --to")
    if not several:
        found = agreeing(recipe)
        if not isinstance(found, str):
            return Way(NAMES, why, found)
        why = f"{why}; {found}"
    if recipe.align:
        raise ConfigError(f"align is an option of surgery, but {why}")
    if importlib.util.find_spec("mergekit") is None:
        raise UsageError(f"{why}, and mergekit is not installed", hint="pip install 'checkpoint-surgery[merge]'")
    return Way(MERGEKIT, why)


def _no_table(recipe: Recipe) -> str:
    """The first model that is no language model of a family in `formats`; "" if all are."""
    for model in recipe.models():
        file = model_folder(model) / "config.json"
        config: Any = read_json(file, "config.json") if file.is_file() else None
        if not isinstance(config, dict):
            continue
        kind, names = config.get("model_type"), config.get("architectures")
        family = FAMILIES.get(kind) if isinstance(kind, str) else None
        if family is None:
            return f"{model} is a {show(kind)}, for which there is no table"
        if isinstance(names, list) and names and names[0] != family.architecture and not _causal(names[0]):
            return f"{model} is a {show(names[0])}, for which there is no table"
    return ""


def _causal(name: object) -> bool:
    """Whether a class is a language model: other spellings of the families' own are read as these."""
    return isinstance(name, str) and name.lower().endswith(("forcausallm", "lmheadmodel"))
