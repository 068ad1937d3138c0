"""mergekit's YAML as frozen dataclasses: the same keys and meanings, but nothing unknown passes in silence.

    recipe = read_recipe("merge_configs/three-seeds.yaml")
    recipe.method, [str(m) for m in recipe.models()]        # "linear", in the order of the file

Keys are those of mergekit 0.1.5 (`config.py`, `tokenizer/config.py`); `seed` and `align` are ours, and mergekit ignores
them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.containers.text import read_yaml
from surgery.errors import show, some, suggest
from surgery.merging.contract import Method
from surgery.merging.methods.registry import METHODS, PARAMETERS
from surgery.merging.parameters import Settings, read_settings
from surgery.merging.reader import Reader, Reference

DTYPES = ("float64", "float32", "bfloat16", "float16")
ALIGN = ("experts",)


@dataclass(frozen=True)
class Source:
    """A model of a slice and which of its layers, [start, stop); None: all of them."""

    model: Reference
    layers: tuple[int, int] | None
    settings: Settings


@dataclass(frozen=True)
class OutputSlice:
    """Layers of the output, each made of one layer of every source."""

    sources: tuple[Source, ...]
    base: Reference | None
    settings: Settings


@dataclass(frozen=True)
class TokenRule:
    """Where the embedding of a token comes from: kind "model" (its own row there), "row" (another one), "zero"."""

    kind: str = ""
    model: Reference | None = None
    row: int | str | None = None
    force: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """`tokenizer_source` or `tokenizer`: source is "union", "base" or a model."""

    source: str | Reference
    rules: Mapping[str, TokenRule] = field(default_factory=dict)
    multiple: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole merge.  `slices` hold what `models`, `slices` or `modules` said; `whole` tells that it was `models`."""

    method: str
    slices: tuple[OutputSlice, ...]
    whole: bool
    base: Reference | None
    settings: Settings  # of the module, then of the whole
    outer: Settings
    dtype: str | None
    out_dtype: str | None
    vocabulary: Vocabulary | None
    chat_template: str | None
    seed: int
    align: str | None
    text: str
    modules: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def donor(self) -> Reference:
        """Who gives the config and the tokenizer: the base model, else the first model named."""
        return self.base or self.slices[0].sources[0].model

    @property
    def reshapes(self) -> bool:
        """Whether the output may have other tensors than the donor."""
        return not self.whole or self.vocabulary is not None or any(m.lora for m in self.models())

    def models(self) -> list[Reference]:
        """Every model that is merged, the base first, then in the order of the file."""
        named = [self.base] if self.base else []
        for s in self.slices:
            named += [source.model for source in s.sources] + ([s.base] if s.base else [])
        return list(dict.fromkeys(named))


_TOP = ("models", "slices", "modules", "merge_method", "base_model", "dtype", "out_dtype", "tokenizer_source",
        "tokenizer", "chat_template", "parameters", "seed", "align")  # fmt: skip


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a YAML file.  Raises FileError and ConfigError."""
    text = Path(path).read_text(errors="replace") if os.path.isfile(path) else ""
    return parse_recipe(read_yaml(path, "merge configuration", aliases=True), os.fspath(path), text)


def parse_recipe(data: Any, file: str = "merge configuration", text: str = "") -> Recipe:
    """The recipe in a mapping as YAML gives it.  Raises ConfigError naming the key that is wrong."""
    r = Reader(file)
    _other_kinds(r, data)
    top = r.mapping(data, "", _TOP, ("name",))
    method = top.get("merge_method")
    if not isinstance(method, str) or method not in METHODS:
        raise r.fail("merge_method", f"is {show(method)}", suggest(method, METHODS))
    chosen = METHODS[method]
    given = [key for key in ("models", "slices", "modules") if top.get(key)]
    if len(given) != 1:
        raise r.fail("", f"one of models, slices and modules is needed, {' and '.join(given) or 'none'} given")
    base = None if top.get("base_model") is None else r.reference(top["base_model"], "base_model")
    inner: Settings = {}
    modules: tuple[str, ...] = ()
    body, whole = top[given[0]], given[0] == "models"
    if given[0] == "modules":
        if not isinstance(body, dict) or not body:
            raise r.fail("modules", "is no mapping from a module's name to its models or slices")
        modules = tuple(str(name) for name in body)
        name, module = next(iter(body.items()))
        keys = r.mapping(module, f"modules.{name}", ("slices", "models", "parameters"))
        if bool(keys.get("slices")) == bool(keys.get("models")):
            raise r.fail(f"modules.{name}", "either slices or models are needed")
        whole = bool(keys.get("models"))
        body = keys["models"] if whole else keys["slices"]
        inner = read_settings(keys.get("parameters"), chosen.shared_names(), r, f"modules.{name}.parameters")
    slices = (_whole(r, body, base, chosen),) if whole else tuple(
        _slice(r, s, f"slices[{i}]", chosen) for i, s in enumerate(r.items(body, "slices"))
    )  # fmt: skip
    recipe = Recipe(
        method=method,
        slices=slices,
        whole=whole,
        base=base,
        settings=inner,
        outer=read_settings(top.get("parameters"), chosen.shared_names(), r, "parameters"),
        dtype=_dtype(r, top, "dtype"),
        out_dtype=_dtype(r, top, "out_dtype"),
        vocabulary=_vocabulary(r, top),
        chat_template=_text(r, top, "chat_template"),
        seed=_whole_number(r, top.get("seed", 0), "seed"),
        align=r.choice(top.get("align"), "align", ALIGN),
        text=text or _written(top),
        modules=modules,
        notes=tuple(r.notes),
    )
    _contract(r, recipe)
    return recipe


def _other_kinds(r: Reader, data: Any) -> None:
    """Raise ConfigError for what is right elsewhere."""
    given = data if isinstance(data, dict) else {}
    if "experts" in given or "gate_mode" in given:
        hint = "surgery upcycle BASE DST --strategy mix --source MODEL"
        raise r.fail("", "this makes a mixture of experts, as mergekit-moe does", hint)
    if lost := [key for key in given if key in PARAMETERS]:
        raise r.fail("", f"{some(lost)}: it stands at the top", "move it under parameters")


def _written(data: Mapping[str, Any]) -> str:
    """What was given as a mapping, as the YAML that means it."""
    import yaml

    return str(yaml.safe_dump(dict(data), sort_keys=False))


def _dtype(r: Reader, top: Mapping[str, Any], key: str) -> str | None:
    value = top.get(key)
    return r.choice(value.removeprefix("torch.") if isinstance(value, str) else value, key, DTYPES)


def _text(r: Reader, top: Mapping[str, Any], key: str) -> str | None:
    value = top.get(key)
    if value is not None and not isinstance(value, str):
        raise r.fail(key, f"is {show(value)}, not a text")
    return value


def _whole_number(r: Reader, value: Any, at: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise r.fail(at, f"is {show(value)}, not a whole number")
    return value


def _whole(r: Reader, body: Any, base: Reference | None, chosen: Method) -> OutputSlice:
    """`models`: all layers of every model; the base comes last if it is not among them, as in mergekit."""
    sources = []
    for i, item in enumerate(r.items(body, "models")):
        at = f"models[{i}]"
        keys = r.mapping(item, at, ("model", "parameters"))
        if "model" not in keys:
            raise r.fail(at, "model is missing")
        settings = read_settings(keys.get("parameters"), chosen.input_names(), r, at + ".parameters")
        sources.append(Source(r.reference(keys["model"], at), None, settings))
    if base is not None and all(s.model != base for s in sources):
        sources.append(Source(base, None, {}))
    return OutputSlice(tuple(sources), None, {})


def _slice(r: Reader, item: Any, at: str, chosen: Method) -> OutputSlice:
    keys = r.mapping(item, at, ("sources", "base_model", "residual_weight", "parameters"))
    if keys.get("residual_weight") is not None:
        raise r.fail(at, "residual_weight has no effect in mergekit 0.1.5; remove it")
    sources: list[Source] = []
    for i, source in enumerate(r.items(keys.get("sources"), at + ".sources")):
        where = f"{at}.sources[{i}]"
        given = r.mapping(source, where, ("model", "layer_range", "parameters"))
        if "model" not in given:
            raise r.fail(where, "model is missing")
        span = given.get("layer_range")
        ints = isinstance(span, list) and len(span) == 2 and all(type(x) is int for x in span)
        if not isinstance(span, list) or not ints or not 0 <= span[0] <= span[1]:
            raise r.fail(where + ".layer_range", f"{span!r:.40} is no [first, behind the last]")
        settings = read_settings(given.get("parameters"), chosen.input_names(), r, where + ".parameters")
        sources.append(Source(r.reference(given["model"], where), (span[0], span[1]), settings))
    counts = {s.layers[1] - s.layers[0] for s in sources if s.layers}
    if len(counts) != 1:
        raise r.fail(at, "its sources have different numbers of layers")
    base = None if keys.get("base_model") is None else r.reference(keys["base_model"], at + ".base_model")
    return OutputSlice(tuple(sources), base, read_settings(keys.get("parameters"), chosen.shared_names(), r,
                                                           at + ".parameters"))  # fmt: skip


def _vocabulary(r: Reader, top: Mapping[str, Any]) -> Vocabulary | None:
    source, table = top.get("tokenizer_source"), top.get("tokenizer")
    if source is not None and table is not None:
        raise r.fail("tokenizer", "and tokenizer_source exclude each other")
    if source is not None:
        return Vocabulary(_tokenizer_source(r, source, "tokenizer_source"))
    if table is None:
        return None
    keys = r.mapping(table, "tokenizer", ("source", "tokens", "pad_to_multiple_of"))
    rules = {}
    for token, rule in (keys.get("tokens") or {}).items():
        rules[str(token)] = _rule(r, rule, f"tokenizer.tokens[{show(token)}]")
    multiple = keys.get("pad_to_multiple_of")
    if multiple is not None and (type(multiple) is not int or not 0 < multiple < 1 << 24):
        raise r.fail("tokenizer.pad_to_multiple_of", f"is {show(multiple)}, not a positive number")
    return Vocabulary(_tokenizer_source(r, keys.get("source", "union"), "tokenizer.source"), rules, multiple)


def _tokenizer_source(r: Reader, value: Any, at: str) -> str | Reference:
    return value if value in ("union", "base") else r.reference(value, at)


def _rule(r: Reader, rule: Any, at: str) -> TokenRule:
    keys = r.mapping(rule, at, ("source", "force"))
    force, source = keys.get("force", False), keys.get("source")
    if type(force) is not bool:
        raise r.fail(at + ".force", f"is {show(force)}, neither true nor false")
    if source is None:
        return TokenRule(force=force)
    if isinstance(source, dict) and "kind" in source:
        given = r.mapping(source, at + ".source", ("kind", "model", "token_id", "token"))
        kind = r.choice(given["kind"], at + ".source.kind", ("model_token", "zero"))
        if kind == "zero":
            return TokenRule("zero", force=force)
        row = given.get("token_id") if given.get("token_id") is not None else given.get("token")
        if row is None or (given.get("token_id") is not None and given.get("token") is not None):
            raise r.fail(at + ".source", "one of token_id and token is needed")
        return TokenRule("row", r.reference(given.get("model"), at + ".source.model"), row, force)
    return TokenRule("model", r.reference(source, at + ".source"), None, force)


def _contract(r: Reader, recipe: Recipe) -> None:
    """How many models a method takes, and whether it needs a base."""
    method = METHODS[recipe.method]
    for i, s in enumerate(recipe.slices):
        base = s.base or recipe.base
        models = [source.model for source in s.sources]
        at = "models" if recipe.whole else f"slices[{i}]"
        if twice := next((m for m in models if models.count(m) > 1), None):
            raise r.fail(at, f"{show(str(twice))} is named twice")
        if method.base != "ignored" and base is not None and base not in models:
            raise r.fail(at, f"the base model {show(str(base))} is not among its sources")
        if problem := method.refuses(len(models), base is not None and base in models):
            hint = "base_model names the base" if base is None and method.base != "ignored" else None
            raise r.fail(at, f"{recipe.method} {problem}", hint)
