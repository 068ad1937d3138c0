"""dolma's `.csv.gz`: a row `start,end,id,source,line` for each document of the `.npy` beside it.

    read_ends("part-0-00000.csv.gz", limit=5981)      # array([79, 135, 219, ...]): the ends of its documents, in tokens

Written by `dolma tokens` (dolma/tokenizer/memmap_writer.py); an end includes the end-of-text token.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import zlib
from array import array
from collections.abc import Iterator

import numpy as np

from surgery.data.files.mapped import Array
from surgery.errors import FileError, show
from surgery.tensors.files import File

LINE_LIMIT = 1 << 16  # characters; a row has about 100


def read_ends(path: str | os.PathLike[str], limit: int) -> Array:
    """int64 [documents], rising.  `limit`: tokens that the payload can hold at most.

    Raises FileError if the gzip stream is broken, a row does not begin where the one before it ends, or the rows go
    beyond `limit`; so no file makes more rows than there are tokens.
    """
    ends, file = array("q"), File(path).path
    last = 0
    try:
        with gzip.open(file, "rt", encoding="utf-8", newline="") as stream:
            rows = csv.reader(_lines(stream, file))
            for row in rows:
                last = _end(row, last, limit, file, rows.line_num)
                ends.append(last)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        what = f"breaks off after {len(ends)} documents: {show(str(error))}"
        raise FileError(what, file=file, hint="the file is damaged or truncated; copy it again") from None
    return np.frombuffer(ends, np.int64) if ends else np.zeros(0, np.int64)


def _lines(stream: io.TextIOBase, file: str) -> Iterator[str]:
    while line := stream.readline(LINE_LIMIT):
        if len(line) == LINE_LIMIT and line[-1] != "\n":
            raise FileError(f"has a line of more than {LINE_LIMIT} characters", file=file)
        yield line


def _end(row: list[str], last: int, limit: int, file: str, line: int) -> int:
    numbers = row[:2]
    plain = len(numbers) == 2 and all(n.isascii() and n.isdigit() and len(n) < 19 for n in numbers)
    start, end = map(int, numbers) if plain else (-1, -1)
    if start != last or end <= start or end > limit:
        what = f"line {line}: {show(','.join(row))}; a document from {last} on, within {limit} tokens, was expected"
        raise FileError(what, file=file, hint="it belongs to another file, or is damaged")
    return end
