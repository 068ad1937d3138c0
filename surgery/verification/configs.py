"""Compare what two checkpoints say besides their weights: the Spec field by field, facts, tokenizers.

    for field in differences(a, b):
        print(field.name, field.a, field.b, "changes the function" if field.function else "")

Names are for people: `rope base`, not `rope_theta`.  A field has `function` set if the model computes something else
because of it; what weights and shapes show by themselves (`tied`, the vocabulary) has not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.containers.text import read_json
from surgery.errors import show
from surgery.formats.base import Checkpoint
from surgery.model.fields import NEEDED, SIZE
from surgery.model.spec import FIELDS, Rope, Spec
from surgery.tensors.files import File
from surgery.tokenizer import Tokenizer
from surgery.tokenizer.files import vocabulary

ALL = "all differences together"
HEADS = ("kv_heads", "group", "head_dim")  # shapes may not show these: 4 heads of 16 look like 8 of 8
SIZES = frozenset(n for n, field in FIELDS.items() if field.kind in (NEEDED, SIZE)) - set(HEADS)  # shapes show these
SHOWN = ("vocab", "tied")  # the weights show these
_DULL = frozenset("transformers_version _name_or_path architectures dtype torch_dtype".split())


@dataclass(frozen=True)
class Field:
    """One thing that two configs say differently; None on the side that does not say it."""

    name: str
    a: Any
    b: Any
    function: bool

    @property
    def text(self) -> str:
        return f"{self.name}: {_shown(self.a)} and {_shown(self.b)}"


def differences(a: Checkpoint, b: Checkpoint) -> tuple[Field, ...]:
    """Every difference: of the specs, of the facts, of the tokenizers."""
    return (*spec_fields(a.spec, b.spec), *_facts(a.facts, b.facts), *_tokenizers(a.tokenizer, b.tokenizer))


def spec_fields(a: Spec, b: Spec) -> Iterator[Field]:
    """The fields in which two specs differ, ropes taken apart."""
    changes = a.changes(b)
    for name, (x, y) in a.differences(b).items():
        label = FIELDS[name].label
        if name in ("rope", "rope_local"):
            yield from _rope(label, x or a.rope, y or b.rope)
        elif name in changes or not FIELDS[name].means:  # else it is written in two ways and means the same
            yield Field(label, _plain(x), _plain(y), name in changes and name not in SHOWN)


def _rope(label: str, x: object, y: object) -> Iterator[Field]:
    if not isinstance(x, Rope) or not isinstance(y, Rope):
        yield Field(label, _plain(x), _plain(y), x != y)
        return
    if x.base != y.base:
        yield Field(f"{label} base", x.base, y.base, True)
    if x.fraction != y.fraction:
        yield Field(f"{label} fraction", x.fraction, y.fraction, True)
    if dict(x.scaling) != dict(y.scaling):
        keys = dict.fromkeys([*x.scaling, *y.scaling])
        for key in keys if x.scaling and y.scaling else ["type"]:
            if x.scaling.get(key) != y.scaling.get(key):
                name = f"{label} scaling" + ("" if key == "type" else f" {key}")
                yield Field(name, _plain(x.scaling.get(key)), _plain(y.scaling.get(key)), True)


def _plain(value: object) -> Any:
    """A value that JSON can hold."""
    if isinstance(value, Rope):
        return {"base": value.base, "fraction": value.fraction, "scaling": _plain(dict(value.scaling))}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if len(str(value)) <= 120 else str(value)[:117] + "..."


def _facts(a: Mapping[str, object], b: Mapping[str, object]) -> Iterator[Field]:
    """Token ids that either says and other facts that both say.  A format without facts is no difference."""
    if not a or not b:
        return
    for key in dict.fromkeys([*a, *b]):
        one_sided = key not in a or key not in b
        if key in _DULL or (one_sided and not key.endswith("_token_id")) or a.get(key) == b.get(key):
            continue
        yield Field(key, _plain(a.get(key)), _plain(b.get(key)), False)


def _tokenizers(a: Tokenizer | None, b: Tokenizer | None) -> Iterator[Field]:
    """Tokens first (another id or another word is another model), then how text is cut, then bytes of other files."""
    if a is None or b is None:
        if a is not b:
            yield Field("tokenizer", a and a.kind, b and b.kind, False)
        return
    if a.vocab_size is not None and b.vocab_size is not None and a.vocab_size != b.vocab_size:
        yield Field("tokens of the tokenizer", a.vocab_size, b.vocab_size, False)
    yield from _words(vocabulary(a)[0], vocabulary(b)[0])
    for role in sorted(a.special.keys() & b.special.keys()):
        if a.special[role] != b.special[role]:
            yield Field(f"{role} token of the tokenizer", a.special[role], b.special[role], False)
    for name in sorted(a.files.keys() & b.files.keys()):
        one, other = _digest(a.files[name]), _digest(b.files[name])
        if one != other:
            yield Field(f"bytes of {name}", one[:16], other[:16], False)
            if name == "tokenizer.json":
                yield from _cutting(a.files[name], b.files[name])


def _words(a: Mapping[str, int], b: Mapping[str, int]) -> Iterator[Field]:
    """Tokens that have another id, and ids that are another token."""
    moved = [t for t in a.keys() & b.keys() if a[t] != b[t]]
    if moved:
        one = min(moved, key=lambda t: a[t])
        name = f"ids of the tokenizer ({len(moved)} tokens have another one, such as {show(one, 40)})"
        yield Field(name, a[one], b[one], True)
    texts_a, texts_b = ({i: text for text, i in words.items()} for words in (a, b))
    renamed = [i for i in texts_a.keys() & texts_b.keys() if texts_a[i] not in b and texts_b[i] not in a]
    if renamed:
        one_id = min(renamed)
        name = f"tokens of the tokenizer ({len(renamed)} ids mean another one, such as {one_id})"
        yield Field(name, texts_a[one_id], texts_b[one_id], True)


def _cutting(a: Path, b: Path) -> Iterator[Field]:
    """What two tokenizer.json make of a text differently: the normaliser, the rules of cutting, the merges."""
    one, other = (read_json(path, "tokenizer") for path in (a, b))
    if not isinstance(one, dict) or not isinstance(other, dict):
        return
    for key in ("normalizer", "pre_tokenizer"):
        if one.get(key) != other.get(key):
            yield Field(f"{key} of the tokenizer", _plain(one.get(key)), _plain(other.get(key)), True)
    x, y = _merges(one.get("model")), _merges(other.get("model"))
    if x != y:
        at = next((i for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), min(len(x), len(y)))
        name = f"merges of the tokenizer, from number {at} on"
        yield Field(name, x[at] if at < len(x) else None, y[at] if at < len(y) else None, True)


def _merges(model: Any) -> list[str]:
    """The merges of a BPE, as text: "a b" or ["a", "b"] in the file."""
    found = model.get("merges") if isinstance(model, dict) else None
    return [m if isinstance(m, str) else " ".join(map(str, m)) for m in found] if isinstance(found, list) else []


def _digest(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    file, digest = File(path), hashlib.sha256()
    for at in range(0, file.size, 1 << 20):
        digest.update(file.read(at, min(1 << 20, file.size - at), "a tokenizer"))
    return digest.hexdigest()


def one_from_other(a: Spec, b: Spec) -> list[tuple[str, Spec]]:
    """B's spec with one thing from A each, for every thing that changes the function but no shape: (name, spec)."""
    out: list[tuple[str, Spec]] = []
    changed = [name for name in a.changes(b) if name not in SIZES and name not in SHOWN]
    heads = [name for name in changed if name in HEADS]
    if heads:
        out.append(("number and width of heads", b.replace(**{n: getattr(a, n) for n in HEADS})))
    for name in changed:
        if name in ("rope", "rope_local"):
            out += [(f"{FIELDS[name].label}{what}", b.replace(**{name: r})) for what, r in _ropes(a, b, name)]
        elif name not in heads:
            out.append((FIELDS[name].label, b.replace(**{name: getattr(a, name)})))
    if len(changed) > 1:
        everything = b.replace(**{name: getattr(a, name) for name in changed})
        out.append((ALL, everything))
    return out


def _ropes(a: Spec, b: Spec, name: str) -> Iterator[tuple[str, Rope | None]]:
    x, y = getattr(a, name), getattr(b, name)
    if isinstance(x, Rope) and isinstance(y, Rope):
        pairs = {"base": replace(y, base=x.base), "fraction": replace(y, fraction=x.fraction),
                 "scaling": replace(y, scaling=x.scaling)}  # fmt: skip
        each = [(f" {k}", rope) for k, rope in pairs.items() if rope != y]
        yield from each
        if len(each) > 1:
            yield "", x
    else:
        yield "", x
