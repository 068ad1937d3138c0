"""The formats that tokens are written in: how their files are called, which dtype, what is kept of each document.

    FORMATS["dolma"].dtype(100_278)             # "uint32"
    FORMATS["megatron"].stem(2, many=True)      # "tokens-00002"

A file of tokens grows together with one of records, a few bytes for each document; when all is written, the records
become the index.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from surgery.data.files.idx import write_index
from surgery.data.tokenizing import dolma_writer
from surgery.data.tokenizing.encoded import Encoded
from surgery.errors import UsageError, some


@dataclass(frozen=True)
class OutputFormat:
    """A format of token files.

    tokens, index   suffixes of the two files            dtypes   (largest vocabulary, dtype), smallest first
    strips          white space around a text is cut off, as `str.strip` does
    names           the name, file and line of each document are kept
    once            no eos is put after a document that ends with one already, no bos before one that begins with it
    record          documents that begin at token `start` of a file, and the paths of all sources -> bytes
    finish          records, the index to write, dtype -> the file is written
    """

    name: str
    tokens: str
    index: str
    dtypes: tuple[tuple[int, str], ...]
    strips: bool
    names: bool
    once: bool
    stem: Callable[[int, bool], str]
    record: Callable[[Encoded, int, Sequence[str]], bytes]
    finish: Callable[[Path, Path, str], None]

    def dtype(self, vocabulary: int, given: str | None = None) -> str:
        """The dtype for so many ids.  Raises UsageError if the given one cannot hold them, or the format not it."""
        names = [name for _, name in self.dtypes]
        if given is not None and given not in names:
            raise UsageError(f"--dtype {given} is none of {self.name}'s", hint=f"choose among {', '.join(names)}")
        for largest, name in self.dtypes:
            if given is None and vocabulary <= largest:
                return name
            if name == given and vocabulary - 1 <= np.iinfo(name).max:
                return name
        raise UsageError(f"{given or some(names)} cannot hold a vocabulary of {vocabulary} ids")


def _lengths(documents: Encoded, start: int, paths: Sequence[str]) -> bytes:
    return documents.lengths.astype("<i4").tobytes()


def _index(records: Path, index: Path, dtype: str) -> None:
    lengths = np.memmap(records, "<i4", "r") if records.stat().st_size else np.zeros(0, "<i4")
    write_index(index, dtype, lengths)


FORMATS: Mapping[str, OutputFormat] = {
    # Megatron-core datasets/indexed_dataset.py: DType.optimal_dtype is uint16 below 65500 ids
    "megatron": OutputFormat(
        "megatron", ".bin", ".idx", ((65_499, "uint16"), (1 << 31, "int32")),
        strips=False, names=False, once=False,
        stem=lambda number, many: f"tokens-{number:05d}" if many else "tokens", record=_lengths, finish=_index,
    ),
    # dolma tokenizer/tokenizer.py: the dtype is np.min_scalar_type of the largest id, which OLMo relies on
    "dolma": OutputFormat(
        "dolma", ".npy", ".csv.gz", ((1 << 8, "uint8"), (1 << 16, "uint16"), (1 << 32, "uint32")),
        strips=True, names=True, once=True,
        stem=lambda number, many: f"part-0-{number:05d}", record=dolma_writer.rows, finish=dolma_writer.finish,
    ),
}  # fmt: skip
