"""A thousand damaged files: each is a clear error or still the right tokens, and memory stays within bounds."""

from __future__ import annotations

import gzip
import random
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from surgery.data.files.readers import open_tokens
from surgery.data.files.tokens import TokenFile
from surgery.errors import SurgeryError

GOLDEN = Path(__file__).parent / "golden"
MEGATRON, TEXT = GOLDEN / "data" / "megatron", GOLDEN / "tokenize"
# what is opened, the file that is damaged (its front, where a limit says so), and how often
CASES = {
    "idx": (MEGATRON / "a_uint16_oneepoch.bin", MEGATRON / "a_uint16_oneepoch.idx", None, 300),
    "idx of several sequences": (MEGATRON / "multi.bin", MEGATRON / "multi.idx", None, 100),
    "csv.gz": (TEXT / "dolma" / "part-0-00000.npy", TEXT / "dolma" / "part-0-00000.csv.gz", None, 200),
    "rows inside csv.gz": (TEXT / "dolma" / "part-0-00000.npy", TEXT / "dolma" / "part-0-00000.csv.gz", None, 100),
    "ds.index": (
        TEXT / "datatrove" / "00000_unshuffled.ds",
        TEXT / "datatrove" / "00000_unshuffled.ds.index",
        None,
        200,
    ),
    "npy header": (None, None, 128, 200),
}
LIMIT = 4 << 20  # bytes that opening one of these small files may take at once


def tokens_of(file: TokenFile) -> list[int]:
    return file.ids.array.tolist()


def damaged(data: bytes, rng: random.Random, front: int | None) -> bytes:
    """A byte or several changed, a piece cut out or put in, or the end gone."""
    size = min(front or len(data), len(data))
    out, at = bytearray(data), rng.randrange(size)
    kind = rng.randrange(5)
    if kind == 0:
        out[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        out[at : at + 8] = rng.randbytes(min(8, len(out) - at))
    elif kind == 2:
        del out[at : at + rng.randrange(1, 20)]
    elif kind == 3:
        out[at:at] = rng.randbytes(rng.randrange(1, 20))
    else:
        del out[at:]
    return bytes(out)


@pytest.mark.parametrize("name", CASES)
def test_damage_is_an_error_and_never_a_wrong_token(name, tmp_path):
    payload, victim, front, times = CASES[name]
    if payload is None:
        (tmp_path / "whole").mkdir()
        payload = victim = tmp_path / "whole" / "ids.npy"
        np.save(payload, np.arange(1000, dtype=np.uint16))
    for near in payload.parent.glob(f"{payload.stem}.*"):
        shutil.copy(near, tmp_path)
    opened, spoilt = tmp_path / payload.name, tmp_path / victim.name
    right, whole = tokens_of(open_tokens(opened)[0]), victim.read_bytes()
    rng, errors = random.Random(name), []
    for _ in range(times):
        if name.startswith("rows"):
            spoilt.write_bytes(gzip.compress(damaged(gzip.decompress(whole), rng, front), mtime=0))
        else:
            spoilt.write_bytes(damaged(whole, rng, front))
        tracemalloc.start()
        try:
            [file] = open_tokens(opened)
            assert file.bounds is None or int(file.bounds.starts(np.array([len(file.bounds)]))[0]) == file.tokens
            assert tokens_of(file) == right
        except SurgeryError as error:
            errors.append(str(error))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < LIMIT, peak
    assert len(errors) > times * 0.6
    assert [e for e in errors if str(tmp_path) not in e] == []
