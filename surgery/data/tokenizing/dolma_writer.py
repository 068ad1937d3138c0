"""dolma's `.csv.gz` beside a `.npy` of bare ids: a row `start,end,id,src,loc` for each document.

    rows(documents, start=0, paths=["docs/a.jsonl.gz"])      # b"0,79,doc-1,docs/a.jsonl.gz,10\\r\\n"

As `dolma tokens` writes it (dolma tokenizer/memmap_writer.py): positions in tokens, an end includes the eos, loc is a
line number from 1.  The `.npy` is no NumPy file, it has no header.
"""

from __future__ import annotations

import csv
import gzip
import io
import shutil
from collections.abc import Sequence
from pathlib import Path

from surgery.data.tokenizing.encoded import Encoded
from surgery.writing.atomic import atomic_file

LEVEL = 6  # of gzip


def rows(documents: Encoded, start: int, paths: Sequence[str]) -> bytes:
    """The rows of documents that begin at token `start` of their file."""
    out = io.StringIO(newline="")
    ends = (documents.ends + start).tolist()
    begins = [start, *ends[:-1]]
    sources = [paths[file] for file in documents.files.tolist()]
    csv.writer(out).writerows(
        zip(begins, ends, documents.names or (), sources, documents.lines.tolist(), strict=True) if ends else ()
    )
    return out.getvalue().encode("utf-8", "surrogateescape")


def finish(records: Path, index: Path, dtype: str) -> None:
    """Pack all rows; the bytes depend on the rows alone."""
    with (
        open(records, "rb") as plain,
        atomic_file(index) as file,
        gzip.GzipFile("", "wb", LEVEL, file, mtime=0) as packed,
    ):
        shutil.copyfileobj(plain, packed, 1 << 20)
