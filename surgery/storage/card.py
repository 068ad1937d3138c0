"""A model card, README.md, from the records that lie beside an output: what it is, where it comes from, its proof.

    card(Path("moe"), "moe")            # Markdown; None where surgery.json is missing or README.md is there

A merge shows its YAML, as mergekit takes it, and has mergekit's tags.  Of local paths only names are told.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from surgery.containers.text import read_json
from surgery.errors import SurgeryError, printable
from surgery.storage.published import SOUP, told
from surgery.units import count
from surgery.writing.replaceable import PROVENANCE

CARD = "README.md"
_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@[^/]+)?(?:/.*)?")

Json = Mapping[str, Any]


def card(folder: Path, name: str) -> bytes | None:
    """The text of README.md; None if there is one, or surgery wrote no checkpoint there."""
    if (folder / CARD).exists() or not (folder / PROVENANCE).is_file():
        return None
    record, soup = _read(folder / PROVENANCE), _read(folder / SOUP)
    if "content_digest" not in record:
        return None
    blocks = [_front(record, soup), f"# {_line(name)}", _what(record, soup), *_provenance(record, soup), *_recipe(soup),
              *_proof(record), *_notes(record)]  # fmt: skip
    return ("\n\n".join(blocks) + "\n").encode()


def _read(path: Path) -> dict[str, Any]:
    """A record as it is published; an empty one if it is none.  A card is no reason to fail."""
    with suppress(SurgeryError):
        found = told(read_json(path, path.name)) if path.is_file() else None
        return found if isinstance(found, dict) else {}
    return {}


def _front(record: Json, soup: Json) -> str:
    """The metadata that the hub reads.  JSON is YAML, and its texts cannot break out."""
    kind = _of(record, "upcycling")
    tags = ["mergekit", "merge"] * bool(soup) + ["moe"] * bool(kind.get("experts")) + ["checkpoint-surgery"]
    models = _hub_names(record, soup)
    lines = ["---", *[f"base_model: {json.dumps(models)}"] * bool(models)]
    if _of(record, "output").get("format") == "hf":
        lines.append("library_name: transformers")
    return "\n".join([*lines, f"tags: {json.dumps(tags)}", "---"])


def _hub_names(record: Json, soup: Json) -> list[str]:
    """Those of the sources that lie on the hub."""
    paths = [str(m.get("path")) for m in _of(soup, "models").values() if isinstance(m, dict)]
    paths = paths or [str(_of(record, "source").get("path"))]
    return list(dict.fromkeys(m[1] for path in paths if (m := _ADDRESS.fullmatch(path))))


def _what(record: Json, soup: Json) -> str:
    """One sentence."""
    source, size, kind = _of(record, "source"), record.get("parameters"), _of(record, "upcycling")
    parameters = f" of {count(size)} parameters" if isinstance(size, int) else ""
    form = f"in the format `{_code(_of(record, 'output').get('format'))}`"
    if soup:
        how = f"merged from {len(_of(soup, 'models'))} models by `{_code(soup.get('method'))}`"
    elif kind.get("strategy"):
        how = f"made from `{_code(source.get('path'))}` by the strategy `{_code(kind['strategy'])}`: " \
              f"{kind.get('experts')} experts, {kind.get('top_k')} of them active"  # fmt: skip
    elif kind:
        how = f"made from `{_code(source.get('path'))}` by a change of its experts"
    else:
        how = f"written from `{_code(source.get('path'))}`, format `{_code(source.get('format'))}`"
    return f"A model{parameters} {form}, {how}."


def _provenance(record: Json, soup: Json) -> Iterator[str]:
    yield "## Provenance"
    models = [f"`{_code(name)}`" for name in _of(soup, "models")]
    words = [word for word in _list(record, "command") if isinstance(word, str)]
    versions = ", ".join(f"{_line(k)} {_line(v)}" for k, v in _of(record, "versions").items() if v)
    rows = (
        ("models" if models else "source", ", ".join(models) or f"`{_code(_of(record, 'source').get('path'))}`"),
        ("digest of the source's weights", record.get("source_digest") and f"`{_code(record['source_digest'])}`"),
        ("digest of these weights", record.get("content_digest") and f"`{_code(record['content_digest'])}`"),
        ("read back and equal", {True: "yes", False: "no"}.get(record.get("verified"))),  # type: ignore[arg-type]
        ("left out", ", ".join(f"`{_code(n)}`" for n in list(_of(record, "dropped"))[:20])),
        ("command", words and f"`{_code(shlex.join(words))}`"),
        ("written by", f"surgery {_line(record.get('surgery'))}, {versions}"),
    )
    yield "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows if value)])
    yield "Digests are of the model's parts, so they are equal for the same weights in any format."


def _recipe(soup: Json) -> Iterator[str]:
    """The YAML of a merge."""
    if isinstance(text := soup.get("config"), str):
        text = printable(text.strip(), 20_000)
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        yield "## Recipe"
        yield f"{fence}yaml\n{text}\n{fence}"


def _proof(record: Json) -> Iterator[str]:
    """What was measured after an upcycling."""
    proof = _of(record, "proof")
    if not proof:
        return
    yield "## Proof"
    promised = "which its strategy promises" if proof.get("promised") else "which its strategy does not promise to be"
    verdict = _line(proof.get("verdict"))
    said = f"The result is {verdict}, {promised}." if verdict.startswith("exact") else f"Verdict: {verdict}."
    yield f"Source and result ran on the same {_line(proof.get('tokens'))} tokens ({_line(proof.get('text'))}). {said}"
    rows = [(name, found) for name in ("fp32", "stored", "floor") if (found := _of(proof, name))]
    names = {"fp32": "in fp32", "stored": f"in {_line(proof.get('dtype'))}", "floor": "the source's own rounding"}
    keys = ("max_diff", "kl", "perplexity", "reference_perplexity")
    table = ["| | max \\|difference\\| | KL | perplexity | of the source |", "|---|---|---|---|---|"]
    yield "\n".join([*table, *(f"| {names[n]} | {' | '.join(_number(row.get(k)) for k in keys)} |" for n, row in rows)])


def _notes(record: Json) -> Iterator[str]:
    notes = [note for note in _list(record, "notes") if isinstance(note, str)]
    if notes:
        yield "## Notes"
        yield "\n".join(f"- {_line(note)}" for note in notes[:30])


def _of(record: Json, key: str) -> dict[str, Any]:
    found = record.get(key)
    return found if isinstance(found, dict) else {}


def _list(record: Json, key: str) -> list[Any]:
    found = record.get(key)
    return found if isinstance(found, list) else []


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, (int, float)) else _line(value)


def _line(value: object) -> str:
    """Text that stays on its line and is no markup."""
    text = printable(" ".join(str(value).split()), 300)
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)


def _code(value: object) -> str:
    """Text between backquotes in a table."""
    return printable(" ".join(str(value).split()), 1000).replace("`", "'").replace("|", "\\|")
