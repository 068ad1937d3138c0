"""DCP folders whose metadata or shards lie, and OLMo's encoded names: written with torch's own record classes."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from attacks.build import NONE, Case, call, g, i, pkl, t, torch_zip, u
from attacks.tables import blob as st_blob
from attacks.tables import entry
from surgery.containers import open_file
from surgery.containers.dcp import Dcp
from surgery.formats.olmo.names import decode_names

WEIGHT = torch.arange(32, dtype=torch.float32).reshape(8, 4)
VALUES = {"w": WEIGHT.tolist(), "objects": {"o": [1, "two"]}}


def saved(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


class Runs:
    """Unpickling it touches the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


class Draft:
    """A good folder of two chunks in two shards and one object, to be spoilt before it is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.chunks = [ChunkStorageMetadata(torch.Size((row, 0)), torch.Size((4, 4))) for row in (0, 4)]
        self.blobs = [saved(WEIGHT[:4].clone()), saved(WEIGHT[4:].clone())]
        self.object = saved([1, "two"])
        self.size: Any = torch.Size((8, 4))
        self.properties: Any = TensorProperties(torch.float32)
        self.shards = {"__0_0.distcp": self.blobs[0] + self.object, "__1_0.distcp": self.blobs[1]}
        self.places: dict[Any, Any] = {
            MetadataIndex("w", torch.Size((0, 0))): _StorageInfo("__0_0.distcp", 0, len(self.blobs[0])),
            MetadataIndex("w", torch.Size((4, 0))): _StorageInfo("__1_0.distcp", 0, len(self.blobs[1])),
            MetadataIndex("o"): _StorageInfo("__0_0.distcp", len(self.blobs[0]), len(self.object)),
        }
        self.entries: dict[Any, Any] = {}
        self.planner: Any = None
        self.metadata: bytes | None = None

    def place(self, number: int, **fields: Any) -> None:
        """Change a storage entry."""
        index = list(self.places)[number]
        self.places[index] = dataclasses.replace(self.places[index], **fields)

    def replace(self, number: int, blob: bytes) -> None:
        """Another blob for a chunk."""
        self.shards[f"__{number}_0.distcp"] = blob
        self.place(number, offset=0, length=len(blob))
        if number == 0:
            del self.places[MetadataIndex("o")]
            self.object = b""

    def write(self) -> None:
        entries = {"w": TensorStorageMetadata(self.properties, self.size, self.chunks)} | self.entries
        if self.object:
            entries["o"] = BytesStorageMetadata()
        record = Metadata(entries, self.planner, self.places)
        for name, data in self.shards.items():
            (self.folder / name).write_bytes(data)
        (self.folder / ".metadata").write_bytes(pickle.dumps(record, 4) if self.metadata is None else self.metadata)


def read(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    dcp = Dcp(path)
    values = {name: lazy.full().tolist() for name, lazy in dcp.tensors.items()}
    objects = {name: describe() for name, describe in dcp.objects.items()}
    return values | ({"objects": objects} if objects else {}), tuple(dcp.globals)


def dcp(name: str, refused: str | None, spoil: Callable[[Draft], Any], **more: Any) -> Case:
    def make(folder: Path) -> Path:
        draft = Draft(folder)
        spoil(draft)
        draft.write()
        return folder

    return Case(f"dcp {name}", make, refused, **({"values": VALUES, "read": read} | more))


def chunk(draft: Draft, number: int, start: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    draft.chunks[number] = ChunkStorageMetadata(torch.Size(start), torch.Size(sizes))


def moved(draft: Draft, number: int, start: Any) -> None:
    """The storage entry of a chunk says another offset."""
    places = list(draft.places.items())
    index = MetadataIndex("w", torch.Size((8, 8)))
    object.__setattr__(index, "offset", start)
    places[number] = (index, places[number][1])
    draft.places = dict(places)


def both(*steps: Callable[[Draft], Any]) -> Callable[[Draft], None]:
    def spoil(draft: Draft) -> None:
        for step in steps:
            step(draft)

    return spoil


def sets(**fields: Any) -> Callable[[Draft], None]:
    return lambda draft: draft.__dict__.update(fields)


def linked(draft: Draft) -> None:
    (draft.folder / "store").mkdir()
    (draft.folder / "store" / "x").write_bytes(draft.shards.pop("__1_0.distcp"))
    (draft.folder / "__1_0.distcp").symlink_to("store/x")


CHUNKED = 1 << 31
DCP = [
    dcp("honest", None, lambda d: None),
    dcp("honest, linked shard", None, linked),
    dcp(
        "honest, empty chunk without data",
        None,
        lambda d: d.chunks.append(ChunkStorageMetadata(torch.Size((8, 0)), torch.Size((0, 4)))),
    ),
    dcp(
        "payload in metadata",
        None,
        lambda d: setattr(d, "planner", Runs(d.folder / "marker")),
        globals=("posix.system",),
    ),
    dcp(
        "payload as metadata",
        "holds 'posix.system', not the Metadata record",
        lambda d: setattr(d, "metadata", pickle.dumps(Runs(d.folder / "marker"))),
    ),
    dcp(
        "payload as object",
        None,
        lambda d: (
            d.shards.update({"__0_0.distcp": d.blobs[0] + saved([Runs(d.folder / "marker")])}),
            d.place(2, length=len(saved([Runs(d.folder / "marker")]))),
        )[0],
        read=lambda p: (type(Dcp(p).objects["o"]()[0]).__name__, ()),
        values="Obj",
    ),
    dcp("payload as chunk", "are <Obj>, not a plain tensor", lambda d: d.replace(1, saved(Runs(d.folder / "marker")))),
    dcp(
        "payload as entry",
        "entry 'w' is malformed|unknown kind 'posix.system'",
        lambda d: d.entries.update(w=Runs(d.folder / "marker")),
    ),
    dcp(
        "payload as storage entry",
        "fields|storage entry has the name None|storage entry is malformed",
        lambda d: d.places.update({Runs(d.folder / "marker"): Runs(d.folder / "marker")}),
    ),
    dcp("metadata empty", "ends without STOP", sets(metadata=b"")),
    dcp("metadata is a number", "holds 7, not the Metadata record", sets(metadata=pickle.dumps(7))),
    dcp(
        "metadata with leftovers", "4 unexplained bytes", sets(metadata=pickle.dumps(Metadata({}, None, {})) + b"more")
    ),
    dcp("metadata with a storage", "persistent id in a pickle", sets(metadata=pkl(t(u("storage")) + b"Q"))),
    dcp("metadata without entries", "no state_dict_metadata", sets(metadata=pkl(g("x.Metadata") + b")\x81"))),
    dcp("metadata of lists", "no state_dict_metadata", sets(metadata=pickle.dumps(Metadata([], None, [])))),  # type: ignore[arg-type]
    dcp(
        "entry of unknown kind",
        "unknown kind 'torch.Size'|entry 'x' is malformed",
        lambda d: d.entries.update(x=torch.Size((1,))),
    ),
    dcp("entry of a record of unknown kind", "unknown kind", lambda d: d.entries.update(x=MetadataIndex("x"))),
    dcp("entry with a number as name", "entry 7 is malformed", lambda d: d.entries.update({7: BytesStorageMetadata()})),
    dcp(
        "object without data",
        "'x', chunk at none, has no storage entry",
        lambda d: d.entries.update(x=BytesStorageMetadata()),
    ),
    dcp(
        "chunk without data",
        r"'w', chunk at \[4, 0\], has no storage entry",
        lambda d: d.places.pop(MetadataIndex("w", torch.Size((4, 0)))),
    ),
    dcp(
        "data without entry",
        "'x', offset none, fits no entry",
        lambda d: (
            d.places.update({MetadataIndex("x"): _StorageInfo("__2_0.distcp", 0, 1)}),
            d.shards.update({"__2_0.distcp": b"x"}),
        ),
    ),
    dcp("data for another chunk", "has no storage entry", lambda d: moved(d, 1, torch.Size((5, 0)))),
    dcp("data offset of a float", "chunk offset of 'w' is 4.0", lambda d: moved(d, 1, (4.0, 0))),
    dcp("data offset is text", "chunk offset of 'w' is '4'", lambda d: moved(d, 1, "4")),
    *(
        dcp(f"shard {name[:12]!r}", "not a plain file name", lambda d, name=name: d.place(1, relative_path=name))
        for name in ("../x.distcp", "/etc/passwd", "a/b", "", "..", "a\0b", "\x1b[2J")
    ),
    dcp("shard is no text", "names the file 7", lambda d: d.place(1, relative_path=7)),
    dcp("shard missing", "shard '__1_0.distcp' is missing", lambda d: d.shards.pop("__1_0.distcp")),
    dcp(
        "shard is a device",
        "no regular file",
        lambda d: (d.shards.pop("__1_0.distcp"), (d.folder / "__1_0.distcp").symlink_to("/dev/zero")),
    ),
    dcp(
        "shard is a pipe",
        "no regular file",
        lambda d: (d.shards.pop("__1_0.distcp"), os.mkfifo(d.folder / "__1_0.distcp")),
    ),
    dcp("shard cut", "outside the file", lambda d: d.shards.update({"__1_0.distcp": d.blobs[1][:-1]})),
    dcp("shard empty", "outside the file", lambda d: d.shards.update({"__1_0.distcp": b""})),
    dcp("offset negative", "storage offset of 'w' is -1", lambda d: d.place(1, offset=-1)),
    dcp("offset of an exabyte", "outside the file", lambda d: d.place(1, offset=1 << 60)),
    dcp("offset off by one", "outside the file", lambda d: d.place(1, offset=1)),
    dcp("length short", "end record of the zip archive is missing", lambda d: d.place(1, length=len(d.blobs[1]) - 1)),
    dcp("length zero", "too few for a zip", lambda d: d.place(1, length=0)),
    dcp("length is a float", "storage length of 'w' is 10.0", lambda d: d.place(1, length=10.0)),
    dcp("length over both blobs", "the data of 'w' and 'o' overlap", lambda d: d.place(0, length=len(d.blobs[0]) + 1)),
    dcp(
        "two chunks with the same data",
        "the data of 'w' and 'w' overlap",
        lambda d: d.place(1, relative_path="__0_0.distcp", length=len(d.blobs[0])),
    ),
    dcp("compressed", "transformed .compressed. form", lambda d: d.place(1, transform_descriptors=["stream.zstd/1"])),
    dcp("dtype unknown", "unknown dtype", lambda d: setattr(d, "properties", TensorProperties(torch.qint8))),
    dcp("dtype is text", "unknown dtype 'float32'", lambda d: setattr(d.properties, "dtype", "float32")),
    dcp("properties missing", "properties of 'w' are malformed", sets(properties=None)),
    dcp(
        "chunks missing",
        "hold 0 elements, its shape .* has 32",
        lambda d: (d.chunks.clear(), [d.places.pop(k) for k in list(d.places)[:2]]),
    ),
    dcp("chunks are text", "chunks of 'w' are 'all'", sets(chunks="all")),
    dcp("chunk is a number", "chunk offset of 'w' is None", lambda d: d.chunks.__setitem__(1, 7)),
    dcp("chunk outside", r"chunk \[4, 0\] of 'w', sizes \[5, 4\], lies outside", lambda d: chunk(d, 1, (4, 0), (5, 4))),
    dcp("chunk enormous", "lies outside the shape", lambda d: chunk(d, 1, (4, 0), (CHUNKED, CHUNKED))),
    dcp(
        "chunk negative",
        "chunk size of 'w' is",
        lambda d: d.chunks.__setitem__(1, ChunkStorageMetadata((4, 0), (-4, -4))),
    ),  # type: ignore[arg-type]
    dcp("chunk of other dimensions", "a chunk of 'w' has 1 dimensions, not 2", lambda d: chunk(d, 1, (16,), (16,))),
    dcp("chunk smaller: a hole", "hold 28 elements, its shape .8, 4. has 32", lambda d: chunk(d, 1, (4, 0), (3, 4))),
    dcp("chunk larger: an overlap", "hold 36 elements|overlap", both(lambda d: chunk(d, 0, (0, 0), (5, 4)))),
    dcp(
        "chunks overlap with the right volume",
        "overlap",
        both(
            lambda d: setattr(d, "size", torch.Size((9, 4))),
            lambda d: chunk(d, 0, (0, 0), (5, 4)),
            lambda d: chunk(d, 1, (4, 0), (4, 4)),
        ),
    ),
    dcp("chunk twice", "has no storage entry|two chunks", lambda d: chunk(d, 1, (0, 0), (4, 4))),
    dcp("shape larger", "hold 32 elements, its shape .9, 4. has 36", sets(size=torch.Size((9, 4)))),
    dcp(
        "shape enormous",
        "its shape .* has 85070591730234615847396907784232501249",
        sets(size=torch.Size(((1 << 63) - 1,) * 2)),
    ),
    dcp("shape of text", "size of 'w' is 'big'", sets(size="big")),
    dcp(
        "blob of another shape",
        r"a chunk of 'w' is float32\[5, 4\], but the metadata say float32\[4, 4\]",
        lambda d: d.replace(1, saved(torch.zeros(5, 4))),
    ),
    dcp(
        "blob of another dtype",
        "is float64.4, 4., but the metadata say float32",
        lambda d: d.replace(1, saved(torch.zeros(4, 4, dtype=torch.float64))),
    ),
    dcp("blob transposed shape", "is float32.2, 8.", lambda d: d.replace(1, saved(torch.zeros(2, 8)))),
    dcp("blob is a dict", "are <dict>, not a plain tensor", lambda d: d.replace(1, saved({"w": torch.zeros(4, 4)}))),
    dcp(
        "blob is sparse", "are <Obj>, not a plain tensor", lambda d: d.replace(1, saved(torch.zeros(4, 4).to_sparse()))
    ),
    dcp("blob is noise", "end record of the zip archive is missing", lambda d: d.replace(1, b"noise" * 100)),
    dcp("blob is a legacy stream", "end record of the zip archive is missing", lambda d: d.replace(1, pkl(NONE) * 30)),
    dcp("blob is larger than its chunk", None, lambda d: d.replace(1, saved(torch.cat([WEIGHT, WEIGHT])[4:8]))),
    dcp("blob is transposed in memory", None, lambda d: d.replace(1, saved(WEIGHT[4:].t().contiguous().t()))),
    dcp("blob with a call", "unknown pickle|are <Obj>", lambda d: d.replace(1, torch_zip(call(g("a.b"), i(1))))),
]


def both_kinds(folder: Path) -> Path:
    Draft(folder).write()
    (folder / "model.safetensors").write_bytes(st_blob({"w": entry()}))
    return folder


def sharded(folder: Path) -> Path:
    path = folder / "shard.safetensors"
    path.write_bytes(st_blob({"__metadata__": {"DCP_SHARDING_INFO": "{}"}, "w": entry()}))
    return path


def encoded(key: Any, data: bytes | None = None) -> str:
    return base64.urlsafe_b64encode(pickle.dumps(key, 4) if data is None else data).decode()


def read_olmo(path: Path) -> tuple[Any, tuple[str, ...]]:
    plain, pickled = decode_names(open_file(path).tensors, str(path))
    return (list(plain), list(pickled)), ()


def olmo(
    name: str,
    refused: str | None,
    key: str | Callable[[Path], str],
    values: Any = None,
    more: dict[str, Any] | None = None,
) -> Case:
    def make(folder: Path) -> Path:
        path = folder / "model.safetensors"
        text = key if isinstance(key, str) else key(folder / "marker")
        path.write_bytes(st_blob({text: entry()} | (more or {})))
        return path

    return Case(f"olmo name {name}", make, refused, values=values, read=read_olmo)


OLMO = [
    olmo("honest", None, encoded((("a", 3, "w"), False)), (["a.3.w"], [])),
    olmo("honest, pickled value", None, encoded((("groups",), True)), ([], ["groups"])),
    olmo("payload", "does not decode to", lambda m: encoded(Runs(m))),
    olmo(
        "payload as key", "decodes to <Obj>, not to a tuple|decodes to <tuple>", lambda m: encoded(((Runs(m),), False))
    ),
    olmo("not base64", "is not base64", "model.embed!"),
    olmo("not ASCII", "is not base64", "\u00fc\u00fc"),
    olmo("too long", "is not base64", "A" * (1 << 17)),
    olmo("not a pickle", "memo 101 is read but was never written", base64.b64encode(b"hello world").decode()),
    olmo("with leftovers", "does not decode to", encoded(None, pickle.dumps((("w",), False), 4) + b"x")),
    olmo("of three", "does not decode to", encoded((("w",), False, 1))),
    olmo("flag is a number", "does not decode to", encoded((("w",), 0))),
    olmo("without keys", "not to a tuple of keys", encoded(((), False))),
    olmo("of floats", "not to a tuple of keys", encoded(((1.5,), False))),
    olmo(
        "twice",
        "two tensors have the name 'a.w'",
        encoded((("a", "w"), False)),
        more={encoded((("a.w",), False)): entry(32, 32, shape=[0])},
    ),
]

CASES: list[Case] = [
    *DCP,
    *OLMO,
    Case("folder of two kinds", both_kinds, "holds both"),
    Case("safetensors shard of a DCP folder", sharded, "parts of others"),
]
