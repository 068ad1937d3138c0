"""The tokenizer of a merge: one of the models', or the union of all, with tokens added and a chat template set.

    out = union(base, [(base, 32000), (other, 32016)], ["<think>"], scratch)
    out = with_template(out, "chatml", [tokenizers], scratch)

A tokenizer.json is edited as the JSON it is: tokens keep the ids that they have in the base, new ones come behind
them in the order of the models and of their own ids, so that the result is always the same.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgery import tokenizer
from surgery.errors import ConfigError, UsageError, show
from surgery.tensors.lazy import bytes_of
from surgery.tokenizer import Tokenizer
from surgery.tokenizer.files import describe, read_json, vocabulary

DOCUMENT, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


def in_hf_form(found: Tokenizer, rows: int, folder: Path) -> Tokenizer:
    """The tokenizer with a tokenizer.json, which is made in `folder` if it has none (SentencePiece, rank files)."""
    if found.kind == "hf":
        return found
    folder.mkdir(parents=True)
    for file in tokenizer.for_hf(found, vocab_size=rows, max_length=2048).files:
        data = b"".join(bytes(bytes_of(r.tensor.full())) for r in file.regions) or file.head
        target = folder / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    made = tokenizer.find(folder)
    if made is None or DOCUMENT not in made.files:
        raise ConfigError("this tokenizer cannot be brought to the form of Hugging Face", file=found.native)
    return made


def known(found: Tokenizer, rows: int) -> dict[str, int]:
    """Token -> id, in the order of the ids; tokens without a row of the model are left out."""
    tokens, _ = vocabulary(found)
    return {text: i for text, i in sorted(tokens.items(), key=lambda item: item[1]) if i < rows}


def union(
    base: Tokenizer, others: Iterable[tuple[Tokenizer, int]], extra: Iterable[str], folder: Path
) -> tuple[Tokenizer, list[str]]:
    """`base` with the tokens of the others (each with the rows of its model) and `extra`, and which were added.

    Plain tokens of the others come first, then their added tokens with their own settings, as in mergekit; a token
    that is added in several ways is added in the first.  Raises ConfigError if the base has no tokenizer.json.
    """
    tokens, _ = vocabulary(base)
    own = {e.get("content") for e in _entries(base)}
    plain: dict[str, None] = {}
    added: dict[str, Mapping[str, Any]] = {}
    for found, rows in others:
        special = {e["content"]: e for e in _entries(found) if e["id"] < rows}
        plain |= {text: None for text in known(found, rows) if text not in special and text not in tokens}
        added |= {text: e for text, e in special.items() if text not in own and text not in added}
    wanted: dict[str, Mapping[str, Any]] = {text: PLAIN for text in plain if text not in added}
    wanted |= added
    wanted |= {text: PLAIN for text in extra if text not in tokens and text not in wanted}
    if not wanted:
        return base, []
    return _with_tokens(base, tokens, wanted, folder), [text for text in wanted if text not in tokens]


def _entries(found: Tokenizer) -> list[dict[str, Any]]:
    entries = read_json(found.files.get(DOCUMENT)).get("added_tokens")
    good = entries if isinstance(entries, list) else []
    return [e for e in good if isinstance(e, dict) and isinstance(e.get("content"), str) and type(e.get("id")) is int]


def _with_tokens(
    base: Tokenizer, tokens: Mapping[str, int], wanted: Mapping[str, Mapping[str, Any]], folder: Path
) -> Tokenizer:
    """Tokens that the vocabulary has already keep their id and become added tokens."""
    if DOCUMENT not in base.files:
        raise ConfigError("the tokenizer has no tokenizer.json, so no token can be added to it",
                          hint="load it with transformers and save it again")  # fmt: skip
    document = read_json(base.files[DOCUMENT])
    place, fresh = max(tokens.values(), default=-1) + 1, []
    for text, settings in wanted.items():
        fresh.append({**settings, "id": tokens.get(text, place), "content": text})
        place += text not in tokens
    document["added_tokens"] = sorted([*_entries(base), *fresh], key=lambda e: e["id"])
    files = dict(base.files)
    files[DOCUMENT] = _write(folder / DOCUMENT, document)
    settings = read_json(base.files.get(SETTINGS))
    if isinstance(settings.get("added_tokens_decoder"), dict):
        shown = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in fresh}
        settings["added_tokens_decoder"] = {**settings["added_tokens_decoder"], **shown}
        files[SETTINGS] = _write(folder / SETTINGS, settings)
    found = describe({k: v for k, v in files.items() if k != "added_tokens.json"})
    assert found is not None
    return found


def _write(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def template_of(found: Tokenizer) -> str | None:
    """The chat template of a tokenizer: a file of its own, or an entry of tokenizer_config.json."""
    if TEMPLATE in found.files:
        return found.files[TEMPLATE].read_text(encoding="utf-8", errors="replace")
    value = read_json(found.files.get("chat_template.json")).get("chat_template")
    value = value or read_json(found.files.get(SETTINGS)).get("chat_template")
    if isinstance(value, list):
        named = {e.get("name"): e.get("template") for e in value if isinstance(e, dict)}
        value = named.get("default")
    return value if isinstance(value, str) and value else None


def with_template(
    found: Tokenizer | None, wanted: str, models: Sequence[Tokenizer | None], folder: Path
) -> tuple[Tokenizer | None, str]:
    """The tokenizer with a chat template, and a note: "auto" (the models' most frequent one), a name that mergekit
    knows (chatml, llama3 ...), or the template itself.  Raises ConfigError and UsageError."""
    if found is None:
        raise ConfigError("chat_template is given, but the merge has no tokenizer")
    if wanted == "auto":
        texts = [t.strip() for m in models if m is not None and (t := template_of(m))]
        if not texts:
            return found, "chat_template auto: no model has one"
        text, many = Counter(texts).most_common(1)[0]
        note = f"the chat template is the one that {many} of the models have"
    elif len(wanted) < 256 and "\n" not in wanted and "{" not in wanted:
        text, note = _named(wanted), f"the chat template is mergekit's {wanted}"
    elif "{" not in wanted:
        raise ConfigError(f"chat_template is {show(wanted)}, which is no template")
    else:
        text, note = wanted, "the chat template is that of the YAML"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TEMPLATE).write_text(text, encoding="utf-8")
    files = {**found.files, TEMPLATE: folder / TEMPLATE}
    files.pop("chat_template.json", None)
    settings = read_json(found.files.get(SETTINGS))
    if settings.pop("chat_template", None) is not None:
        files[SETTINGS] = _write(folder / SETTINGS, settings)
    return replace(found, files=files), note


def _named(name: str) -> str:
    from importlib import resources, util

    if util.find_spec("mergekit") is None:
        raise UsageError(f"chat_template {show(name)} is one of mergekit's, which is not installed",
                         hint="pip install 'checkpoint-surgery[merge]', or write the template itself")  # fmt: skip
    folder = resources.files("mergekit._data.chat_templates")
    names = sorted(p.name.removesuffix(".jinja") for p in folder.iterdir() if p.name.endswith(".jinja"))
    if name not in names:
        raise ConfigError(f"chat_template is {show(name)}", hint=f"known: auto, {', '.join(names)}, or a template")
    return folder.joinpath(name + ".jinja").read_text(encoding="utf-8")
