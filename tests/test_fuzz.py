"""Random damage to small good files: every reader answers with values or a SurgeryError, never anything else.

SURGERY_FUZZ_SECONDS lengthens the search; the seed is fixed, so a failure comes back.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attacks.archives import GOOD, zip64
from attacks.build import legacy, torch_zip, u, weights
from attacks.folders import Draft
from attacks.payloads import PAYLOADS
from attacks.tables import blob, entry
from surgery.containers import open_tensors
from surgery.containers.dcp import Dcp
from surgery.containers.pickles.describe import describe
from surgery.containers.text import parse_json
from surgery.containers.yaml_loader import parse_yaml
from surgery.errors import SurgeryError

SECONDS = float(os.environ.get("SURGERY_FUZZ_SECONDS", "2"))
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)
SEPARATOR = b"---metadata above, shard below---"
TREE = {"a": [1, 2.5, "x", b"y", (None, True)], "b": {"c": -1, 3: {}}, "d": {1, 2}}
JSON = json.dumps({"weight_map": {"w": "a.safetensors"}, "n": [1, -2.5e3, None, "\u20ac"]}).encode()
YAML = b"a: {b: [1, 2.5, 1e-05], c: null}\nd: |\n  text\n  more\ne: 'x'\n? f\n: [true, no]\n"


def damage(random_: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """A few random edits: flips, cuts, copies, pieces of other files, sizes that lie."""
    out = bytearray(data)
    for _ in range(random_.choice((1, 1, 1, 2, 3, 6))):
        at = random_.randrange(len(out) + 1)
        end = min(len(out), at + random_.choice((1, 2, 4, 8, 30)))
        match random_.randrange(7):
            case 0 if at < len(out):
                out[at] ^= 1 << random_.randrange(8)
            case 1 if at < len(out):
                out[at] = random_.choice(INTERESTING)
            case 2:
                del out[at:end]
            case 3:
                out[at:at] = out[at:end] * random_.choice((1, 2, 50))
            case 4:
                other = random_.choice(others)
                start = random_.randrange(len(other) + 1)
                out[at:end] = other[start : start + random_.choice((1, 5, 40))]
            case 5:
                size = random_.choice(("<I", "<Q", "<H"))
                value = random_.choice((0, 1, -1, 7, 1 << 31, len(out), len(out) + 1))
                width = struct.calcsize(size)
                out[at : at + width] = struct.pack(size, value % (1 << 8 * width))
            case 6 if random_.random() < 0.2:
                del out[at:]
    return bytes(out)


def read_file(data: bytes, folder: Path) -> None:
    path = folder / "file"
    path.write_bytes(data)
    for lazy in open_tensors(path).values():
        lazy.full()


def read_pickle(data: bytes, folder: Path) -> None:
    describe(data, file="x")


def read_dcp(data: bytes, folder: Path) -> None:
    """Metadata and shard are damaged as one text, with a separator between them."""
    metadata, _, shard = data.partition(SEPARATOR)
    (folder / ".metadata").write_bytes(metadata)
    (folder / "__0_0.distcp").write_bytes(shard)
    dcp = Dcp(folder)
    for lazy in dcp.tensors.values():
        lazy.full()
    for describe_object in dcp.objects.values():
        describe_object()


def dcp_seed() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        draft = Draft(Path(folder))
        draft.place(1, relative_path="__0_0.distcp", offset=len(draft.blobs[0] + draft.object))
        draft.write()
        metadata = (Path(folder) / ".metadata").read_bytes()
    return metadata + SEPARATOR + draft.blobs[0] + draft.object + draft.blobs[1]


READERS: dict[str, tuple[Callable[[bytes, Path], object], list[bytes]]] = {
    "torch zip": (
        read_file,
        [GOOD, zip64(), torch_zip(weights((u("x"), PAYLOADS["import_getattr"](Path("gone")))), protocol=4)],
    ),
    "torch legacy": (read_file, [legacy(), legacy(weights((u("x"), PAYLOADS["inst"](Path("gone")))))]),
    "safetensors": (
        read_file,
        [
            blob({"__metadata__": {"format": "pt"}, "w": entry(0, 16, shape=[4]), "v": entry(16, 32, "BF16", [2, 4])}),
            blob({"w": entry()}),
        ],
    ),
    "dcp": (read_dcp, [dcp_seed()]),
    "pickle": (read_pickle, [pickle.dumps(TREE, protocol) for protocol in range(6)]),
    "json": (lambda data, folder: parse_json(data, "x"), [JSON]),
    "yaml": (lambda data, folder: parse_yaml(data, "x", "config"), [YAML]),
}


@pytest.mark.parametrize("name", READERS)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    read, seeds = READERS[name]
    random_ = random.Random(name)
    for seed in seeds:
        read(seed, tmp_path)  # the undamaged ones are read
    end, done, refused = time.monotonic() + SECONDS, 0, 0
    while time.monotonic() < end:
        data = damage(random_, random_.choice(seeds), seeds)
        done += 1
        try:
            read(data, tmp_path)
        except SurgeryError as error:
            refused += 1
            text = str(error)
            assert text.isascii() and len(text) < 1200, (data, text)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__} instead of a SurgeryError for {data!r}") from error
    assert done > 20 and refused > done // 10, (done, refused)
    assert not (tmp_path / "marker").exists()


KEYS = st.one_of(st.text(max_size=4), st.integers(-(1 << 59), 1 << 59), st.binary(max_size=3), st.none())
TREES = st.recursive(
    st.one_of(KEYS, st.booleans(), st.integers(-(1 << 200), 1 << 200), st.floats(allow_nan=False)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=4),
        st.tuples(inner, inner),
        st.lists(inner, max_size=300).map(tuple),
    ),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(tree=TREES, protocol=st.integers(0, 5))
def test_any_plain_tree_is_read_as_pickle_reads_it(tree: object, protocol: int) -> None:
    data = pickle.dumps(tree, protocol)
    assert repr(describe(data, file="x").root) == repr(pickle.loads(data))


OPCODES = st.lists(
    st.one_of(
        st.sampled_from(
            [bytes([code]) for code in b"N(0123tuedls}]a)\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94\x81Rbo"]
        ),
        st.sampled_from(
            [b"cos\nsystem\n", b"K\1", b"q\1", b"h\1", b"I12\n", b"F1.5\n", b"S'a'\n", b"Vb\n", b"p2\n", b"g2\n"]
        ),
        st.sampled_from(
            [b"X\1\0\0\0k", b"U\1k", b"\x8a\1\7", b"G" + b"\0" * 8, b"ctorch\nFloatStorage\n", b"Q", b"\x80\4"]
        ),
        st.sampled_from(
            [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"cnumpy\ndtype\n", b"ia\nb\n"]
        ),
        st.sampled_from(
            [b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy.core.multiarray\nscalar\n", b"c_codecs\nencode\n"]
        ),
        st.sampled_from(
            [b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuK\10tQ", b"cbuiltins\nset\n"]
        ),
        st.binary(min_size=1, max_size=3),
    ),
    max_size=40,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(opcodes=OPCODES)
def test_any_opcodes_end_in_a_value_or_an_error(opcodes: list[bytes]) -> None:
    said = ""
    try:
        describe(b"\x80\2" + b"".join(opcodes) + b".", file="x")
    except SurgeryError as error:
        said = str(error)
    assert said.isascii() and len(said) < 1200
