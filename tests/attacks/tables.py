"""safetensors headers and index files that lie, and text files that two readers would understand differently."""

# ruff: noqa: E501  (tables of cases, one a line)
from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from attacks.build import FLOATS, NONE, VALUES, Case, d, file_case, torch_zip, u, weights
from surgery.containers.text import read_json, read_line, read_tracker, read_yaml


def entry(start: int = 0, stop: int = 32, dtype: Any = "F32", shape: Any = (8,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def blob(header: Any, data: bytes = FLOATS, size: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if size is None else size) + raw + data


def st(name: str, header: Any, refused: str | None, data: bytes = FLOATS, **more: Any) -> Case:
    return file_case(f"safetensors {name}", blob(header, data), refused, suffix=".safetensors", **more)


def raw_st(name: str, data: bytes, refused: str | None) -> Case:
    return file_case(f"safetensors {name}", data, refused, suffix=".safetensors")


GOOD = blob({"w": entry()})
TWICE = b'{"w":{"dtype":"F32","shape":[8],"data_offsets":[0,32]},"w":{"dtype":"F32","shape":[8],"data_offsets":[0,32]}}'
SAFETENSORS = [
    st("honest", {"__metadata__": {"format": "pt"}, "w": entry()}, None),
    st("honest, padded header", json.dumps({"w": entry()}).encode() + b"   ", None),
    st("honest, order of the header", {"b": entry(16, 32, shape=[4]), "a": entry(0, 16, shape=[4])}, None,
       values={"a": VALUES[:4], "b": VALUES[4:]}),
    st("honest, empty and scalar", {"e": entry(0, 0, shape=[0, 5]), "s": entry(0, 4, shape=[])}, None, FLOATS[4:8],
       values={"e": [], "s": 1.0}),
    st("honest, 128 byte header", json.dumps({"w": entry()}).encode().ljust(128), None),
    st("honest, nothing at all", {}, None, b"", values={}),
    raw_st("shorter than its length", b"\1\2\3", "no checkpoint that surgery knows"),
    raw_st("header past the end", blob({"w": entry()}, size=1 << 20), "lie outside the file"),
    raw_st("header of 100 MB", blob({"w": entry()}, size=100_000_001), "header of 100000001 bytes is over the limit"),
    raw_st("header of 2^64", blob({"w": entry()}, size=(1 << 64) - 1), "is over the limit"),
    raw_st("header cut", GOOD[:20], "lie outside the file"),
    raw_st("header begins with a space", blob(b" " + json.dumps({"w": entry()}).encode()), "no checkpoint|not begin"),
    raw_st("header is a list", blob(b"[1, 2]"), "no checkpoint that surgery knows"),
    raw_st("header shorter than its JSON", blob({"w": entry()}, size=12), "not valid JSON"),
    st("header not UTF-8", b'{"\xff":1}', "header is not UTF-8"),
    st("header with two values", b'{}{}', "not valid JSON: Extra data"),
    st("header with a comma", b'{"w":1,}', "not valid JSON"),
    st("name twice", TWICE, "key 'w' appears twice"),
    st("field twice", b'{"w":{"dtype":"F32","dtype":"I32","shape":[8],"data_offsets":[0,32]}}', "'dtype' appears twice"),
    st("NaN in the shape", b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,32]}}', "NaN in the safetensors header"),
    st("Infinity", b'{"__metadata__":Infinity}', "Infinity in"),
    st("1e999", b'{"__metadata__":1e999}', "'1e999' in .* is too large"),
    st("integer of 5,000 digits", b'{"w":' + b"9" * 5000 + b"}", "integer of 5000 digits"),
    st("nested 100,000 deep", b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply", bomb=True),
    st("nested 500 deep", b'{"w":' + b"[" * 500 + b"]" * 500 + b"}", "nested deeper than 64|nested too deeply"),
    st("half a surrogate", b'{"\\ud800":{"dtype":"F32","shape":[8],"data_offsets":[0,32]}}', "surrogate"),
    st("metadata of numbers", {"__metadata__": {"a": 1}, "w": entry()}, "not a map of text to text"),
    st("metadata is a list", {"__metadata__": ["a"], "w": entry()}, "not a map of text to text"),
    st("metadata is null", {"__metadata__": None, "w": entry()}, "not a map of text to text"),
    st("entry is a list", {"w": [1]}, "entry of 'w' is malformed"),
    st("entry lacks a field", {"w": {"dtype": "F32", "shape": [8]}}, "entry of 'w' is malformed"),
    st("entry with another field", {"w": entry() | {"strides": [1]}}, "entry of 'w' is malformed"),
    st("dtype unknown", {"w": entry(dtype="F7")}, "unknown dtype 'F7'"),
    st("dtype of 4 bits", {"w": entry(dtype="F4")}, "unknown dtype 'F4'"),
    st("dtype is a list", {"w": entry(dtype=["F32"])}, "unknown dtype <list>"),
    st("dtype as torch", {"w": entry(dtype="float32")}, "unknown dtype 'float32'"),
    st("shape negative", {"w": entry(shape=[-8])}, "are malformed"),
    st("shape of two negatives", {"w": entry(shape=[-2, -4])}, "are malformed"),
    st("shape of floats", {"w": entry(shape=[8.0])}, "are malformed"),
    st("shape of booleans", {"w": entry(0, 4, shape=[True])}, "are malformed", FLOATS[:4]),
    st("shape is a number", {"w": entry(shape=8)}, "are malformed"),
    st("shape of 65 dimensions", {"w": entry(shape=[1] * 64 + [8])}, "are malformed"),
    st("shape wraps to 32 bytes", {"w": entry(shape=[1 << 62, 1 << 62])}, "lies in data_offsets of 32 bytes"),
    st("shape of 2^70", {"w": entry(shape=[1 << 70])}, "are malformed"),
    st("shape larger than its bytes", {"w": entry(shape=[9])}, "of 36 bytes lies in data_offsets of 32 bytes"),
    st("shape smaller than its bytes", {"w": entry(shape=[7])}, "of 28 bytes lies in data_offsets of 32 bytes"),
    st("offsets reversed", {"w": entry(32, 0)}, "data_offsets of -32 bytes"),
    st("offsets negative", {"w": entry(-32, 0)}, "are malformed"),
    st("offsets of three", {"w": entry() | {"data_offsets": [0, 16, 32]}}, "are malformed"),
    st("offsets of floats", {"w": entry() | {"data_offsets": [0.0, 32.0]}}, "are malformed"),
    st("hole before", {"w": entry(16, 32, shape=[4])}, "begins at 16, not at 0"),
    st("hole between", {"a": entry(0, 8, shape=[2]), "b": entry(16, 32, shape=[4])}, "begins at 16, not at 8"),
    st("overlap", {"a": entry(0, 20, shape=[5]), "b": entry(16, 32, shape=[4])}, "begins at 16, not at 20"),
    st("same bytes twice", {"a": entry(), "b": entry()}, "begins at 0, not at 32"),
    st("past the end", {"w": entry(0, 64, shape=[16])}, "outside the file"),
    st("far past the end", {"w": entry(0, 1 << 62, shape=[1 << 60])}, "outside the file"),
    st("bytes left over", {"w": entry()}, "describes .* bytes, the file has", FLOATS + b"\0"),
    st("bytes missing", {"w": entry()}, "outside the file", FLOATS[:-1]),
    st("empty tensor inside another", {"a": entry(), "e": entry(16, 16, shape=[0])}, "begins at 16, not at 32"),
    st("payload as name", {"cos\nsystem\n(S'touch x'\ntR.": entry()}, None, values={"cos\nsystem\n(S'touch x'\ntR.": VALUES}),
]  # fmt: skip


def index(
    name: str,
    weight_map: Any,
    refused: str | None,
    files: dict[str, bytes] | None = None,
    raw: bytes | None = None,
    prepare: Callable[[Path], None] = lambda folder: None,
    **more: Any,
) -> Case:
    def make(folder: Path) -> Path:
        for file, data in ({"a.safetensors": GOOD} if files is None else files).items():
            (folder / file).write_bytes(data)
        prepare(folder)
        path = folder / "model.safetensors.index.json"
        path.write_bytes(raw if raw is not None else json.dumps({"metadata": {}, "weight_map": weight_map}).encode())
        return path

    return Case(f"index {name}", make, refused, **more)


def outside(folder: Path) -> None:
    """What lies above the checkpoint's folder is readable, and none of its business."""
    (folder / "sub").mkdir()
    (folder / "sub" / "x.safetensors").write_bytes(GOOD)
    (folder.parent / "outside.safetensors").write_bytes(GOOD)


def cached(folder: Path) -> None:
    """Hugging Face's cache: the shard is a link to a blob elsewhere"""
    (folder / "blobs").mkdir()
    (folder / "blobs" / "0a1b").write_bytes(GOOD)
    (folder / "a.safetensors").symlink_to(Path("blobs") / "0a1b")


def link(target: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "a.safetensors").symlink_to(target)


TWO = {"a.safetensors": GOOD, "b.safetensors": blob({"v": entry()})}
W = {"w": "a.safetensors"}
INDEX = [
    index("honest", W, None),
    index("honest, two shards", W | {"v": "b.safetensors"}, None, TWO, values={"w": VALUES, "v": VALUES}),
    index("honest, linked shard", W, None, {}, prepare=cached),
    index("honest, torch shards", {"w": "a.bin"}, None, {"a.bin": torch_zip(weights())}),
    *(
        index(f"shard {shard[:20]!r}", {"w": shard}, "not a plain file name", prepare=outside)
        for shard in ("../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\0b", "a\nb", "C:\\x",
                      "\\\\host\\x", "a" * 300, "./a.safetensors", "sub/../a.safetensors")
    ),
    *(
        index(f"shard of type {type(shard).__name__}", {"w": shard}, "not a plain file name")
        for shard in (1, None, ["a.safetensors"], {"a": 1}, True)
    ),
    index("shard named in another script", {"w": "\u202eabc\u00e9"}, "no checkpoint|names", {"\u202eabc\u00e9": b"nothing"}),
    index("shard missing", {"w": "b.safetensors"}, "shard 'b.safetensors' is missing"),
    index("shard is a device", W, "no regular file", {}, prepare=link("/dev/zero")),
    index("shard is a dangling link", W, "No such file", {}, prepare=link("gone")),
    index("shard is a folder", W, "is a directory", {}, prepare=lambda f: (f / "a.safetensors").mkdir()),
    index("shard is the index", {"w": "model.safetensors.index.json"}, "no checkpoint that surgery knows|JSON"),
    index("shard is a page", W, "HTML", {"a.safetensors": b"<html>404</html>"}),
    index("tensor not in its shard", W | {"x": "a.safetensors"}, "not in their shard: 'x'"),
    index("tensor in another shard", {"w": "b.safetensors", "v": "a.safetensors"}, "not in their shard: 'w', 'v'", TWO),
    index("tensor not listed", {"w": "a.safetensors"}, "shards hold: 'v' in 'a.safetensors'",
          {"a.safetensors": blob({"w": entry(0, 16, shape=[4]), "v": entry(16, 32, shape=[4])})}),
    index("tensor in two shards", {"w": "a.safetensors", "v": "b.safetensors"}, "'w' also lies in another shard",
          {"a.safetensors": GOOD, "b.safetensors": GOOD}),
    index("torch shard with other things", {"w": "a.bin"}, None, {"a.bin": torch_zip(weights((u("epoch"), NONE)))}),
    index("torch shard with a sparse weight", {"w": "a.bin"}, "not in their shard", {"a.bin": torch_zip(d())}),
    index("weight_map missing", None, "has no weight_map"),
    index("weight_map is a list", ["w"], "has no weight_map"),
    index("weight_map empty", {}, "has no weight_map"),
    index("is a list", None, "has no weight_map", raw=b"[]"),
    index("is empty", None, "not valid JSON", raw=b""),
    index("tensor twice", None, "'w' appears twice", raw=b'{"weight_map":{"w":"a.safetensors","w":"b.safetensors"}}'),
    index("cut", None, "not valid JSON", raw=b'{"weight_map":{"w":"a.saf'),
    index("deep", None, "nested", raw=b"[" * 200_000, bomb=True),
    index("pickle", None, "not UTF-8|not valid JSON", raw=b"\x80\x04N."),
]  # fmt: skip


def both(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(GOOD)
    (folder / "model.safetensors.index.json").write_text('{"weight_map":{"w":"model.safetensors"}}')
    return folder


def text(
    name: str,
    read: Callable[[Path], Any],
    data: bytes,
    refused: str | None,
    values: Any = None,
    file: str = "config",
    bomb: bool = False,
) -> Case:
    def make(folder: Path) -> Path:
        (folder / file).write_bytes(data)
        return folder / file

    def reads(path: Path) -> tuple[Any, tuple[str, ...]]:
        return read(path), ()

    return Case(name, make, refused, values=values, read=reads, bomb=bomb)


j = partial(text, read=lambda path: read_json(path, "config"))
y = partial(text, read=lambda path: read_yaml(path, "config"))
LAUGHS = b"a: &a [x,x]\n" + b"".join(b"%c: &%c [*%c,*%c]\n" % (c, c, c - 1, c - 1) for c in range(98, 122))
TEXT = [
    j("json honest", data=b'{"a": [1, 2.5, null, true, "x"]}', refused=None, values={"a": [1, 2.5, None, True, "x"]}),
    j("json key twice", data=b'{"a": 1, "a": 2}', refused="key 'a' appears twice in config"),
    j("json inner key twice", data=b'{"x": {"a": 1, "a": 1}}', refused="key 'a' appears twice"),
    j("json NaN", data=b"[NaN]", refused="NaN in config"),
    j("json -Infinity", data=b"[-Infinity]", refused="-Infinity in config"),
    j("json huge float", data=b"[1e400]", refused="too large"),
    j("json huge integer", data=b"1" * 100_000, refused="integer of 100000 digits"),
    j("json deep", data=b"[" * 100_000 + b"]" * 100_000, refused="nested", bomb=True),
    j("json deep objects", data=b'{"a":' * 900 + b"1" + b"}" * 900, refused="nested"),
    j("json 65 deep", data=b"[" * 65 + b"]" * 65, refused="nested deeper than 64 levels"),
    j("json not UTF-8", data=b'"\xff"', refused="not UTF-8"),
    j("json byte order mark", data=b"\xef\xbb\xbf{}", refused="not valid JSON"),
    j("json control character", data=b'"a\x01"', refused="not valid JSON"),
    j("json comment", data=b"{} // done", refused="not valid JSON"),
    j("json single quotes", data=b"{'a': 1}", refused="not valid JSON"),
    j("json surrogate", data=b'"\\udc80"', refused="surrogate"),
    j("json good surrogate pair", data=b'"\\ud83d\\ude00"', refused=None, values="\U0001f600"),
    y("yaml honest", data=b"a: [1, 2.5, x]\nlr: 1e-05\nb: {c: null}\nd: 2024-01-01\n", refused=None,
      values={"a": [1, 2.5, "x"], "lr": 1e-05, "b": {"c": None}, "d": "2024-01-01"}),
    y("yaml numbers", data=b"[1e5, -1E-05, 1.5e+3, 1_0e1, 12, 0x10, 1e, e5, 1-e5]", refused=None,
      values=[1e5, -1e-05, 1500.0, 100.0, 12, 16, "1e", "e5", "1-e5"]),
    y("yaml python object", data=b"a: !!python/object/apply:os.system ['true']", refused="tag .* is not supported"),
    y("yaml python name", data=b"a: !!python/name:os.system", refused="tag .* is not supported"),
    y("yaml python module", data=b"!!python/module:os", refused="tag .* is not supported"),
    y("yaml python tuple", data=b"a: !!python/tuple [1]", refused="tag .* is not supported"),
    y("yaml own tag", data=b"a: !merge [1]", refused="tag '!merge' is not supported"),
    y("yaml binary", data=b"a: !!binary aGVsbG8=", refused="tag .* is not supported"),
    y("yaml set", data=b"a: !!set {x, y}", refused="tag .* is not supported"),
    y("yaml omap", data=b"a: !!omap [x: 1]", refused="tag .* is not supported"),
    y("yaml timestamp", data=b"a: !!timestamp 2024-01-01", refused="tag .* is not supported"),
    y("yaml alias", data=b"a: &x 1\nb: *x", refused="aliases .* are not supported"),
    y("yaml billion laughs", data=LAUGHS, refused="aliases .* are not supported", bomb=True),
    y("yaml alias of itself", data=b"a: &x [*x]", refused="aliases .* are not supported"),
    y("yaml alias undefined", data=b"a: *x", refused="aliases .* are not supported"),
    y("yaml merge", data=b"a: {<<: {b: 1}}", refused="merge keys .* are not supported"),
    y("yaml merge list", data=b"a: {<<: [{b: 1}]}", refused="merge keys .* are not supported"),
    y("yaml key twice", data=b"a: 1\na: 2", refused="key 'a' appears twice"),
    y("yaml inner key twice", data=b"x:\n  a: 1\n  a: 2", refused="key 'a' appears twice"),
    y("yaml key twice as number", data=b"1: a\n0x1: b", refused="key 1 appears twice"),
    y("yaml key is a list", data=b"? [a]\n: 1", refused="a key is not a scalar"),
    y("yaml key is a map", data=b"? {a: 1}\n: 1", refused="a key is not a scalar"),
    y("yaml two documents", data=b"a: 1\n---\nb: 2", refused="not valid YAML"),
    y("yaml deep", data=b"[" * 20_000, refused="nested deeper than 64 levels|not valid", bomb=True),
    y("yaml deep blocks", data=b"- " * 20_000, refused="nested deeper than 64 levels", bomb=True),
    y("yaml many values", data=b"[" + b"1," * 150_000 + b"]", refused="more than 100000 values", bomb=True),
    y("yaml 2 MB", data=b"# " + b"x" * (2 << 20), refused="over the limit", bomb=True),
    y("yaml long integer", data=b"a: " + b"9" * 5000, refused="scalar of 5000 characters"),
    y("yaml long key", data=b"? " + b"k" * 70_000 + b"\n: 1", refused="scalar of 70000 characters"),
    y("yaml infinity", data=b"a: .inf", refused="not a finite number"),
    y("yaml nan", data=b"a: .nan", refused="not a finite number"),
    y("yaml overflow", data=b"a: 1e999", refused="not a finite number"),
    y("yaml bad integer", data=b"a: !!int x", refused="cannot be read|not valid"),
    y("yaml bad bool", data=b"a: !!bool x", refused="cannot be read|not valid"),
    y("yaml tab", data=b"a:\n\t- b", refused="not valid YAML"),
    y("yaml not UTF-8", data=b"a: \xff", refused="not UTF-8"),
    y("yaml control character", data=b"a: \x01", refused="not valid YAML"),
    y("yaml cut", data=b"a: {b: [1,", refused="not valid YAML"),
    y("yaml empty", data=b"", refused=None, values=None),
    text("tracker honest", read_line, b"global_step12\n", None, "global_step12"),
    text("tracker of two lines", read_line, b"a\nb", "not one line of text"),
    text("tracker empty", read_line, b"\n", "not one line of text"),
    text("tracker of 1 MB", read_line, b"1" * (1 << 20), "over the limit of 256"),
    text("tracker with control characters", read_line, b"\x1b[2J1", "not one line of text"),
    text("tracker not ASCII", read_line, "\uff11\uff12".encode(), "not one line of text"),
    *(
        text(f"deepspeed tracker {name!r}", read_tracker, name.encode(), "not a plain file name", file="latest")
        for name in ("../../etc", "/tmp/x", "a/b", "..", ".", "a\\b", "C:x")
    ),
    text("deepspeed tracker honest", read_tracker, b"global_step12", None, "global_step12", file="latest"),
    *(
        text(f"megatron tracker {name!r}", read_tracker, name.encode(), "neither an iteration nor 'release'",
             file="latest_checkpointed_iteration.txt")
        for name in ("-1", "1.5", "1e3", "0x10", "../x", "1_000", "9" * 12, "latest", "release2")
    ),
    text("megatron tracker honest", read_tracker, b"1200", None, "iter_0001200", file="latest_checkpointed_iteration.txt"),
    text("megatron release", read_tracker, b"release\n", None, "release", file="latest_checkpointed_iteration.txt"),
]  # fmt: skip

FOLDERS = [Case("folder with file and index", both, "holds both model.safetensors and")]
CASES: list[Case] = [*SAFETENSORS, *INDEX, *TEXT, *FOLDERS]
