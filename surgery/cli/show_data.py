"""What `surgery data plan` and `surgery data show` print for people, from the data that `--json` prints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from surgery.cli.console import console, notes
from surgery.data.plans.draft import Draft
from surgery.data.plans.plan import Plan
from surgery.data.rows import RowSource
from surgery.data.show import Decode
from surgery.errors import ConfigError, UsageError
from surgery.units import count

Json = Mapping[str, Any]
ENDS = (10, 3)  # ids that are shown of a passage, at its front and its end


def plan_data(draft: Draft, plan: Plan | None) -> dict[str, Any]:
    """A plan, or the draft of one, as data.  Amounts are in instances where they do not say tokens."""
    mixture, total = draft.mixture, draft.instances
    length, rows = mixture.sequence_length, mixture.rows_per_step
    return {
        "plan": None if plan is None else str(plan.folder),
        "fingerprint": None if plan is None else plan.digest,
        "sequence_length": length,
        "packing": mixture.packing,
        "isolate": mixture.isolate,
        "seed": mixture.seed,
        "sample_seed": mixture.sample_seed,
        "instances": total,
        "tokens": total * length,
        "rows_per_step": rows,
        "steps": rows and total // rows,
        "left_over": rows and total % rows,
        "sources": [
            {
                "name": s.name,
                "files": len(s.entries),
                "documents": s.documents,
                "tokens": s.tokens,
                "label_mask": s.masked,
                "heldout": s.heldout,
                "have": s.have,
                "take": s.take,
                "have_tokens": s.have * length,
                "take_tokens": s.take * length,
                "asked": s.asked,
                "epochs": s.take / s.have if s.have else 0.0,
                "share": s.take / total,
                "steps": rows and s.take / rows,
                "filled": s.filled,
            }
            for s in draft.sources
        ],
        "notes": list(draft.notes),
    }


def plan(data: Json) -> None:
    """`surgery data plan`."""
    out = console()
    rows, length = data["rows_per_step"], data["sequence_length"]
    heads = [
        "source",
        "documents",
        "tokens",
        "held out",
        "have",
        "take",
        "epochs",
        "share",
        *(["steps"] if rows else []),
    ]
    lines = [_cells(s, length) for s in data["sources"]]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for i, head in enumerate(heads):
        width = max(len(head), *(len(line[i]) for line in lines))
        table.add_column(head, justify="right" if i else "left", no_wrap=True, min_width=width)
    for line in lines:
        table.add_row(*map(Text, line[: len(heads)]))
    out.print(table)
    steps = f", {data['steps']:,} steps of {rows:,} rows and {data['left_over']:,} left over" if rows else ""
    what = f"{data['instances']:,} instances of {length:,} tokens: {count(data['tokens'])} tokens{steps}"
    out.print(Text(what, style="bold"))
    notes(out, data["notes"])
    if data["plan"]:
        out.print(Text(f"{data['plan']}: seed {data['seed']}, fingerprint {data['fingerprint'][:16]}"))


def _cells(source: Json, length: int) -> list[str]:
    documents, steps = source["documents"], source["steps"]
    return [
        source["name"],
        "?" if documents is None else count(documents),
        count(source["tokens"]),
        count(source["heldout"] * length),
        count(source["have_tokens"]),
        count(source["take_tokens"]),
        f"{source['epochs']:.3g}",
        f"{source['share']:.1%}",
        "" if steps is None else f"{steps:,.1f}",
    ]


def step(data: Json) -> None:
    """`surgery data show`."""
    out = console()
    sources = ", ".join(f"{n} of {name}" for name, n in data["sources"].items())
    head = f"step {data['step']:,} of {data['steps']:,}: {data['rows_per_step']:,} rows ({sources})"
    out.print(Text(f"{head}, {data['learnt']:,} labels", style="bold"))
    for row in data["rows"]:
        what = f"row {row['row']}  {row['source']} #{row['instance']}, {row['learnt']:,} labels"
        out.print(Text(what, style="cyan"))
        at = 0
        for passage in row["passages"]:
            ids = row["tokens"][at : at + passage["tokens"]]
            at += len(ids)
            document = "" if passage["document"] is None else f" document {passage['document']},"
            out.print(Text(f"  {passage['file']}{document} tokens {passage['start']}-{passage['stop']}", style="dim"))
            out.print(Text(f"    {visible(passage['text']) if 'text' in passage else _few(ids)}"))
        if at < len(row["tokens"]):
            out.print(Text(f"  padding, {len(row['tokens']) - at} tokens", style="dim"))


def _few(ids: list[int]) -> str:
    front, end = ENDS
    shown = ids if len(ids) <= front + end + 1 else [*ids[:front], "...", *ids[-end:]]
    return " ".join(map(str, shown))


def visible(text: str) -> str:
    """On one line, with control characters spelt out: a text must not steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def chosen_rows(text: str | None) -> range | None:
    """What --rows says: `A:B`, `A:`, `:B` or one number; None: all.  Raises UsageError."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{0,9}):(\d{0,9})|(\d{1,9})", text)
    if match is None:
        raise UsageError(f"--rows {text}: write A:B, for example 0:8")
    first = int(match[3] or match[1] or 0)
    return range(first, first + 1 if match[3] else int(match[2] or 10**9))


def decoder(batches: RowSource, tokenizer: str | None) -> Decode:
    """Ids to text, by the tokenizer that is given or that of the plan.  Raises UsageError if there is none."""
    from surgery.data.plans.batches import Batches
    from surgery.data.plans.text_cache import load_tokenizer
    from surgery.data.tokenizing.vocabulary import load_vocabulary

    plan = batches.plan if isinstance(batches, Batches) else None
    if tokenizer is None and plan is not None and plan.mixture.tokenizer is not None:
        vocabulary = load_tokenizer(plan.mixture, plan.root)
    elif tokenizer is not None:
        vocabulary = load_vocabulary(tokenizer)
    else:
        raise UsageError("nothing says which tokenizer decodes these ids", hint="--tokenizer PATH")
    assert vocabulary is not None
    made_with = None if plan is None else plan.fingerprint.get("tokenizer")
    if made_with not in (None, vocabulary.sha256):
        raise ConfigError(f"{vocabulary.name} is another tokenizer than the one of the plan")
    opened = vocabulary.tokenizer
    return lambda ids: opened.decode(ids, skip_special_tokens=False)
