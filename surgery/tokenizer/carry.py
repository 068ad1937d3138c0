"""Tokenizers written for another format: copied where they can be, made anew where they must be.

    files, notes = for_hf(found, vocab_size=128256, max_length=8192, release="3")

Files are output files that `surgery.writing.stream.write` writes; notes are sentences for the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from surgery.containers.output import OutputFile, copied_file, text_file
from surgery.errors import UsageError, show, some
from surgery.tokenizer import bpe, sentencepiece, tiktoken
from surgery.tokenizer.files import NATIVE, ROLES, Tokenizer, read_json, vocabulary


class Carried(NamedTuple):
    """Files of a tokenizer for the target, and in words what was guessed or left behind."""

    files: tuple[OutputFile, ...]
    notes: tuple[str, ...]


def carry(found: Tokenizer) -> Carried:
    """The tokenizer's files unchanged, for formats that have none of their own."""
    return Carried(_copies(found.files), _custom(found))


def _copies(files: Mapping[str, Path]) -> tuple[OutputFile, ...]:
    return tuple(copied_file(name, path) for name, path in sorted(files.items()))


def _custom(found: Tokenizer) -> tuple[str, ...]:
    if not found.custom_code:
        return ()
    return ("tokenizer_config.json names Python code of its own (auto_map), which is not carried",)


def for_hf(
    found: Tokenizer,
    *,
    vocab_size: int,
    max_length: int,
    release: str | None = None,
    ids: Mapping[str, int] | None = None,
) -> Carried:
    """Files that make `AutoTokenizer.from_pretrained` give the ids of this tokenizer.

    `vocab_size` and `max_length` are the model's rows and positions, in tokens.  `release` names the special tokens
    of a rank file: a key of `tiktoken.NAMES`, by default "reference".  `ids` are {"bos": 1, ...} as far as the
    model's config knows them, for a tokenizer.json without tokenizer_config.json.  Raises UsageError and FileError.
    """
    if found.kind == "hf":
        files, notes = _hf_to_hf(found, max_length, ids or {})
    elif found.kind == "sentencepiece":
        files, notes = _sentencepiece_to_hf(found, max_length)
    else:
        files, notes = _tiktoken_to_hf(found, max_length, release)
    if found.vocab_size is not None and found.vocab_size > vocab_size:
        rest = f"ids from {vocab_size} on have no row"
        notes += (f"the tokenizer has {found.vocab_size} tokens, the model {vocab_size} rows: {rest}",)
    return Carried(files, notes)


def _hf_to_hf(found: Tokenizer, max_length: int, ids: Mapping[str, int]) -> Carried:
    files, notes = carry(found)
    if "tokenizer.json" not in found.files or "tokenizer_config.json" in found.files:
        return Carried(files, notes)
    text_of = {index: text for text, index in vocabulary(found)[0].items()}
    tokens = {role: text_of[ids[role]] for role in ROLES if role in ids and ids[role] in text_of}
    named = ", ".join(f"{role} {show(text)}" for role, text in tokens.items()) or "no special tokens"
    return Carried(
        (*files, text_file("tokenizer_config.json", _settings(tokens, max_length))),
        (*notes, f"tokenizer.json came without tokenizer_config.json; one was made with {named}"),
    )


def _sentencepiece_to_hf(found: Tokenizer, max_length: int) -> Carried:
    assert found.native is not None
    model = sentencepiece.read(found.native)
    data, notes = sentencepiece.tokenizer_json(model)
    files = _copies(found.files)
    if data is not None:
        tokens = {role: token[0] for role in ROLES if (token := model.control(role))}
        settings = _settings(tokens, max_length, add_bos_token="bos" in tokens, add_eos_token=False)
        files += (text_file("tokenizer.json", data), text_file("tokenizer_config.json", settings))
    return Carried(files, tuple(notes))


def _tiktoken_to_hf(found: Tokenizer, max_length: int, release: str | None) -> Carried:
    assert found.native is not None
    names = tiktoken.NAMES.get(release or "reference")
    if names is None:
        raise UsageError(f"the release {show(release)} is unknown; use {', '.join(tiktoken.NAMES)}")
    ranks = tiktoken.read(found.native)
    if len(ranks) == tiktoken.LLAMA_4:
        lacking = "no tokenizer.json was made: these are the ranks of Llama 4, whose pattern of words is not supported"
        return Carried(_copies(found.files), (lacking,))
    data = tiktoken.tokenizer_json(ranks, names)
    settings = _settings({"bos": names[0], "eos": names[1]}, max_length)
    told = f"those of release {release}" if release else "those of llama-models, Meta's current program"
    return Carried(
        (*_copies(found.files), text_file("tokenizer.json", data), text_file("tokenizer_config.json", settings)),
        (
            f"a rank file does not name its {tiktoken.SPECIALS} special tokens; the names are {told}",
            f"eos is {names[1]}, as for base models: a rank file holds no chat template and no other stop token",
        ),
    )


def _settings(tokens: Mapping[str, str], max_length: int, **more: Any) -> bytes:
    """A tokenizer_config.json.  The class is the one that takes tokenizer.json as it is."""
    values = {
        **more,
        **{f"{role}_token": text for role, text in tokens.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return bpe.dump(dict(sorted(values.items())))


def for_meta(found: Tokenizer, *, vocab_size: int | None = None) -> Carried:
    """tokenizer.model for Meta's programs where there can be one, and HF's files beside it for the way back.

    `vocab_size` is the model's rows; Meta's Llama 3 wants as many as its tokenizer has tokens.  Raises FileError.
    """
    files = _copies({name: path for name, path in found.files.items() if path != found.native})
    if found.native is not None:
        notes = _custom(found) + (_news(found) if found.kind == "hf" else ())
        return Carried((*files, copied_file(NATIVE, found.native)), notes)
    if "tokenizer.json" in found.files:
        ranks, reason = tiktoken.ranks_of(read_json(found.files["tokenizer.json"]))
    else:
        ranks, reason = None, "there is no tokenizer.json"
    if ranks is None:
        lacking = f"Meta's programs will find no {NATIVE}, and none can be made: {reason}"
        return Carried(files, (*_custom(found), f"{lacking}; carried as they are: {some(sorted(found.files), 9)}"))
    made = f"{NATIVE} was made from tokenizer.json: {len(ranks)} ranks, from which its merges follow"
    notes = (*_custom(found), made, *_strangers(found, len(ranks)))
    if vocab_size is not None and vocab_size != len(ranks) + tiktoken.SPECIALS:
        have = f"the model has {vocab_size} rows"
        notes += (f"Meta's program counts {len(ranks) + tiktoken.SPECIALS} tokens with its special ones, {have}",)
    return Carried((*files, text_file(NATIVE, tiktoken.write(ranks))), notes)


def _news(found: Tokenizer) -> tuple[str, ...]:
    """What HF's files know and tokenizer.model does not."""
    assert found.native is not None
    if found.native_kind == "tiktoken":
        return _strangers(found, len(tiktoken.read(found.native)))
    pieces = sentencepiece.read(found.native).pieces
    vocab, _ = vocabulary(found)
    news = [text for text, index in vocab.items() if index >= len(pieces) or pieces[index].text != text]
    return _unknown(news)


def _strangers(found: Tokenizer, size: int) -> tuple[str, ...]:
    """Added tokens that Meta's program, which appends its own after `size` ranks, does not know by their ids."""
    tables = tiktoken.NAMES.values()
    return _unknown(
        [
            text
            for index, text in found.added.items()
            if not (0 <= index - size < tiktoken.SPECIALS and text in {names[index - size] for names in tables})
        ]
    )


def _unknown(tokens: list[str]) -> tuple[str, ...]:
    if not tokens:
        return ()
    return (f"Meta's programs will not know {len(tokens)} tokens that HF's files add: {some(map(show, tokens))}",)
