"""Token files of every format read as one stream: the same documents, no dtype guessed, no document end invented."""

from __future__ import annotations

import csv
import gzip
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.data.files.documents import EndBounds, document_at
from surgery.data.files.idx import IndexedWriter, write_index
from surgery.data.files.mapped import Held
from surgery.data.files.readers import ends_by_id, open_tokens
from surgery.data.files.tokens import TokenFile, TokenSource
from surgery.data.inspection import inspect_tokens
from surgery.errors import ConfigError, FileError, UsageError

TEXT = Path(__file__).parent / "golden" / "tokenize"
OLMO = Path(__file__).parent / "golden" / "data" / "olmo"


def documents(file: TokenFile) -> list[list[int]]:
    """All documents of a file, through its bounds."""
    assert file.bounds is not None
    edges = file.bounds.starts(np.arange(len(file.bounds) + 1))
    return [file.ids.array[a:b].tolist() for a, b in pairwise(edges)]


def raw_dolma(path: Path) -> list[list[int]]:
    ids = np.fromfile(path, np.uint16).tolist()
    with gzip.open(path.with_suffix(".csv.gz"), "rt") as rows:
        return [ids[int(row[0]) : int(row[1])] for row in csv.reader(rows)]


def raw_datatrove(path: Path) -> list[list[int]]:
    ids, raw = np.fromfile(path, np.uint16).tolist(), Path(f"{path}.index").read_bytes()
    ends = struct.unpack(f"<{len(raw) // 8}Q", raw)
    return [ids[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def test_dolma_documents_and_the_dtype_its_rows_prove():
    for path in sorted((TEXT / "dolma").glob("*.npy")):
        [file] = open_tokens(path, vocab_size=600)
        assert (file.format, file.ids.dtype) == ("dolma", np.uint16)
        assert documents(file) == raw_dolma(path) and len(documents(file)) > 5


@pytest.mark.parametrize("folder", ["datatrove", "datatrove_shuffled"])
def test_datatrove_documents(folder, tmp_path):
    for path in sorted((TEXT / folder).glob("*.ds")):
        [file] = open_tokens(path, vocab_size=600)
        assert documents(file) == raw_datatrove(path)
        for name in (path.name, f"{path.name}.index"):  # the index proves the dtype where the note is gone
            (tmp_path / name).write_bytes((path.parent / name).read_bytes())
        [bare] = open_tokens(tmp_path / path.name)
        assert bare.ids.dtype == np.uint16 and documents(bare) == documents(file)


def test_the_same_documents_in_two_dtypes_and_formats():
    [a], [b] = open_tokens(TEXT / "megatron_uint16.idx"), open_tokens(TEXT / "megatron_int32.bin")
    [c] = open_tokens(TEXT / "datatrove" / "00000_unshuffled.ds")
    assert documents(a) == documents(b) == documents(c)
    assert (a.ids.dtype, b.ids.dtype) == (np.uint16, np.int32)


def test_an_index_beside_another_format_is_taken(tmp_path):
    path = TEXT / "dolma" / "part-0-00000.npy"
    (tmp_path / "x.npy").write_bytes(path.read_bytes())
    write_index(tmp_path / "x.idx", "uint16", [len(d) for d in raw_dolma(path)])
    [file] = open_tokens(tmp_path / "x.npy")
    assert documents(file) == raw_dolma(path)
    assert [f.name for f in file.files] == ["x.npy", "x.idx"]


def test_a_dtype_is_not_guessed():
    path = OLMO / "part-0-00000.npy"
    with pytest.raises(ConfigError, match="nothing beside it tells its dtype"):
        open_tokens(path)
    [file] = open_tokens(path, dtype="uint16", vocab_size=500)
    assert file.tokens == 849 and file.bounds is None
    with pytest.raises(FileError, match="no whole number of uint32"):
        open_tokens(path, dtype="uint32")
    with pytest.raises(FileError, match="cannot hold a vocabulary of 500"):
        open_tokens(path, dtype="uint8", vocab_size=500)
    with pytest.raises(FileError, match="the vocabulary has 400 ids"):
        open_tokens(path, dtype="uint16", vocab_size=400)
    with pytest.raises(FileError, match="the dtype is wrong"):  # the rows have ends for uint16
        open_tokens(TEXT / "dolma" / "part-0-00000.npy", dtype="uint8")


def test_plain_numpy_files_and_documents_by_their_last_id(tmp_path):
    ids = np.array([5, 6, 0, 7, 0, 0, 8, 9], np.int32)
    np.save(tmp_path / "x.npy", ids)
    [file] = open_tokens(tmp_path / "x.npy")
    assert (file.format, file.ids.array.tolist(), file.bounds) == ("npy", ids.tolist(), None)
    [file] = open_tokens(tmp_path / "x.npy", eos=0)
    assert documents(file) == [[5, 6, 0], [7, 0], [0], [8, 9]]
    assert ends_by_id(np.array([1, 0]), 0).tolist() == [2]
    assert ends_by_id(np.array([], int), 0).tolist() == []
    np.save(tmp_path / "y.npy", np.array([1, -1]))
    with pytest.raises(FileError, match="holds id -1"):
        open_tokens(tmp_path / "y.npy")
    np.save(tmp_path / "z.npy", np.zeros((2, 3), np.uint16))
    with pytest.raises(FileError, match="not one row of ids"):
        open_tokens(tmp_path / "z.npy")
    np.save(tmp_path / "o.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(FileError, match="not little-endian integers"):
        open_tokens(tmp_path / "o.npy")


@pytest.mark.slow
def test_folders_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [[1, 2, 3], [], [4, 5], [6]]
    table = datasets.Dataset.from_dict({"input_ids": rows, "labels": [[-100, 2, 3], [], [4, -100], [6]]})
    table.save_to_disk(tmp_path / "d", num_shards=2)
    source = TokenSource("d", tuple(open_tokens(tmp_path / "d")))
    assert [d for f in source.files for d in documents(f)] == rows
    assert source.windows(np.array([1, 0]), 5).tolist() == [[2, 3, 4, 5, 6], [1, 2, 3, 4, 5]]
    mask = source.label_mask(np.array([0]), 6)
    assert mask is not None and mask.tolist() == [[False, True, True, True, False, True]]
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "e")
    with pytest.raises(ConfigError, match="several splits"):
        open_tokens(tmp_path / "e")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "t")
    with pytest.raises(ConfigError, match="no column 'input_ids'"):
        open_tokens(tmp_path / "t")
    wrong = datasets.Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 3]]})
    wrong.save_to_disk(tmp_path / "w")
    with pytest.raises(FileError, match="labels are other ids"):
        open_tokens(tmp_path / "w")
    masked = datasets.Dataset.from_dict({"input_ids": [[1, 2]], "kept": [[0, 1]]})
    masked.save_to_disk(tmp_path / "m")
    [file] = open_tokens(tmp_path / "m", mask="kept")
    assert file.mask is not None and file.mask.array.tolist() == [0, 1]


def test_what_is_not_there_or_lacks_its_index(tmp_path):
    with pytest.raises(FileError, match=r"x\.npy: there is no such file or folder"):
        open_tokens(tmp_path / "x.npy", dtype="uint16")
    np.arange(9, dtype=np.uint16).tofile(tmp_path / "bare.bin")
    with pytest.raises(ConfigError, match=r"has no \.idx beside it") as caught:
        open_tokens(tmp_path / "bare.bin")
    assert caught.value.hint is not None and "surgery data index bare.bin" in caught.value.hint
    for dtype in ("foo", "float32", "<u2"):
        with pytest.raises(UsageError, match=f"there is no dtype '{dtype}'"):
            open_tokens(tmp_path / "bare.bin", "dolma", dtype=dtype)


def test_files_without_a_document(tmp_path):
    """They are read as what they are: empty."""
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"input_ids": [[1, 2]]}).filter(lambda row: False)
    table.save_to_disk(str(tmp_path / "table"))
    (tmp_path / "part.npy").touch()
    (tmp_path / "part.csv.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "part.ds").touch()
    (tmp_path / "part.ds.index").touch()
    for name in ("table", "part.npy", "part.ds"):
        [file] = open_tokens(tmp_path / name)
        assert file.tokens == 0 and file.bounds is not None and len(file.bounds) == 0
        [found] = inspect_tokens(tmp_path / name)
        assert (found.tokens, found.documents, found.longest) == (0, 0, None)


def test_label_masks_beside_files_and_named(tmp_path):
    with IndexedWriter(tmp_path / "x", "uint16") as writer:
        writer.extend([1, 2, 3, 4, 5], [2, 3])
    for name, content in (("x.mask", bytes([0, 1, 1, 0, 1])), ("other", bytes([1, 1, 0, 0, 0]))):
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "header.npy", np.array([1, 0, 0, 0, 1], bool))
    kept = {
        None: [0, 1, 1, 0, 1],
        str(tmp_path / "other"): [1, 1, 0, 0, 0],
        str(tmp_path / "header.npy"): [1, 0, 0, 0, 1],
    }
    for mask, want in kept.items():
        [file] = open_tokens(tmp_path / "x.bin", mask=mask)
        assert file.mask is not None and file.mask.array.tolist() == want
    assert open_tokens(tmp_path / "x.bin", mask="none")[0].mask is None
    (tmp_path / "x.mask").write_bytes(bytes(4))
    with pytest.raises(FileError, match="label mask of 4 uint8 for 5 tokens"):
        open_tokens(tmp_path / "x.bin")
    (tmp_path / "x.mask").write_bytes(bytes([0, 1, 2, 0, 1]))
    source = TokenSource("x", tuple(open_tokens(tmp_path / "x.bin")))
    with pytest.raises(FileError, match="token 2 is 2, neither 0 nor 1"):
        source.label_mask(np.array([1]), 3)


def test_datatroves_own_loss_mask_is_taken(tmp_path):
    (tmp_path / "x.ds").write_bytes(np.arange(4, dtype=np.uint16).tobytes())
    (tmp_path / "x.ds.index").write_bytes(struct.pack("<2Q", 1, 4))
    (tmp_path / "x.ds.loss").write_bytes(bytes([1, 0, 0, 1]))
    [file] = open_tokens(tmp_path / "x.ds")
    assert file.mask is not None and file.mask.array.tolist() == [1, 0, 0, 1]


def test_ids_beyond_the_vocabulary_are_refused_when_they_are_read(tmp_path):
    ids = np.zeros(1_000_000, np.uint16)
    ids[777_777] = 600
    np.save(tmp_path / "x.npy", ids)
    [file] = open_tokens(tmp_path / "x.npy", vocab_size=600)  # a look here and there does not find it
    source = TokenSource("x", (file,), 600)
    assert source.windows(np.array([0]), 10).sum() == 0
    with pytest.raises(FileError, match="token 777777 is 600, but the vocabulary has 600"):
        source.windows(np.array([5, 777_770]), 10)


Parts = st.lists(st.lists(st.integers(0, 7), max_size=12), min_size=1, max_size=5)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(Parts, st.data())
def test_windows_anywhere_in_a_stream_of_files(parts, data):
    """Against plain lists: tokens, the places where documents begin, and what passages say."""
    files, stream, begins, base = [], [], set(), 0
    for k, lengths in enumerate(parts):
        ids = [(17 * i + k) % 97 for i in range(sum(lengths))]
        ends = Held(np.cumsum(lengths, dtype=np.int64))
        files.append(TokenFile(Path(f"f{k}"), "x", Held(np.array(ids, np.uint16)), EndBounds(ends), None, ()))
        begins |= {base + sum(lengths[:i]) for i, n in enumerate(lengths) if n} | ({base} if ids else set())
        stream += ids
        base += len(ids)
    if not stream:
        return
    source = TokenSource("s", tuple(files))
    length = data.draw(st.integers(1, len(stream)))
    starts = np.array(data.draw(st.lists(st.integers(0, len(stream) - length), min_size=1, max_size=8)))
    windows = source.windows(starts, length)
    assert windows.tolist() == [stream[s : s + length] for s in starts]
    rows, offsets = source.starts_within(starts, length)
    found = sorted(zip(rows.tolist(), offsets.tolist(), strict=True))
    assert found == sorted((i, b - s) for i, s in enumerate(starts) for b in begins if s < b < s + length)
    passages = source.passages(int(starts[0]), length)
    texts = [files[int(p.path.name[1:])].ids.array[p.start : p.stop].tolist() for p in passages]
    assert [i for text in texts for i in text] == stream[starts[0] : starts[0] + length]
    assert len(passages) == 1 + sum(starts[0] < b < starts[0] + length for b in begins)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_the_document_of_a_position(lengths):
    bounds = EndBounds(Held(np.cumsum(lengths, dtype=np.int64)))
    owners = [d for d, n in enumerate(lengths) for _ in range(n)]
    assert document_at(bounds, np.arange(sum(lengths))).tolist() == owners
