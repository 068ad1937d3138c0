"""Folders of torch.distributed.checkpoint (DCP): `.metadata`, and `.distcp` files of many small torch zips.

    dcp = Dcp("step1000/model_and_optim")
    dcp.tensors["model.embeddings.weight"].full()      # assembled from its chunks; only these are opened
    dcp.objects["common_state/shard_0_1"]()            # what a non-tensor entry describes

Megatron and OLMo-core write subclasses of torch's records, so records are known by the last part of their name and
by their fields.  torch's own reader unpickles `.metadata`; here it is described like any other pickle.
Source of the layout: torch/distributed/checkpoint/metadata.py, filesystem.py.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from surgery.containers.pickles.allowed import count, counts, dtype_of
from surgery.containers.pickles.describe import describe
from surgery.containers.pickles.machine import Limits
from surgery.containers.pickles.records import BadPickle, Obj, TensorRecord
from surgery.containers.torch_zip import TorchZip
from surgery.errors import FileError, show
from surgery.tensors.chunked import Chunk, Chunked
from surgery.tensors.files import File, plain_name, read_small
from surgery.tensors.lazy import Lazy, Shape

_Key = tuple[str, Shape | None]  # name, and where the chunk begins


@dataclass(frozen=True)
class Blob:
    """A torch zip inside a `.distcp` file."""

    file: File
    offset: int
    length: int

    def open(self) -> TorchZip:
        return TorchZip(self.file, self.offset, self.length)


class Dcp:
    """`tensors` by name, `objects` by name (call one to have it described), `globals` of the metadata.

    `root` is the described Metadata record.  Raises FileError, for chunks when they are first read.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.path = str(self.folder / ".metadata")
        limits = Limits()
        data = read_small(self.path, limits.pickle_bytes, "DCP metadata")
        found = describe(data, file=self.path, storages=False, limits=limits)
        if found.end != len(data):
            raise FileError(
                f"{len(data) - found.end} unexplained bytes after the pickle", file=self.path, byte=found.end
            )
        self.root, self.globals = found.root, found.globals
        if not isinstance(self.root, Obj) or self.root.basename != "Metadata":
            named = show(self.root.path if isinstance(self.root, Obj) else self.root)
            raise FileError(f"holds {named}, not the Metadata record of a DCP folder", file=self.path)
        self.files: dict[str, File] = {}
        self.tensors: dict[str, Lazy] = {}
        self.objects: dict[str, Callable[[], Any]] = {}
        try:
            self._entries()
        except BadPickle as error:
            raise FileError(error.what, file=self.path, hint=error.hint) from None

    @property
    def paths(self) -> list[Path]:
        return [Path(self.path), *(Path(file.path) for file in self.files.values())]

    @property
    def entries(self) -> dict[str, Any]:
        return {**self.tensors, **self.objects}

    def _entries(self) -> None:
        state = self.root.state
        entries, places = state.get("state_dict_metadata"), state.get("storage_data")
        if not isinstance(entries, dict) or not isinstance(places, dict):
            raise BadPickle("has no state_dict_metadata or no storage_data")
        blobs = self._blobs(places)
        self._no_overlaps(blobs)
        for name, record in entries.items():
            if type(name) is not str or not isinstance(record, Obj):
                raise BadPickle(f"entry {show(name)} is malformed")
            if record.basename == "TensorStorageMetadata":
                self.tensors[name] = self._tensor(name, record.state, blobs)
            elif record.basename == "BytesStorageMetadata":
                blob = blobs.pop((name, None), None) or _missing(name)
                self.objects[name] = partial(_described, blob)
            else:
                raise BadPickle(f"entry {show(name)} is of the unknown kind {show(record.path)}")
        if blobs:
            name, start = next(iter(blobs))
            raise BadPickle(f"a storage entry for {show(name)}, offset {_list(start)}, fits no entry or chunk")

    # ---- where things lie

    def _blobs(self, places: dict[Any, Any]) -> dict[_Key, Blob]:
        out: dict[_Key, Blob] = {}
        for index, info in places.items():
            if not isinstance(index, Obj) or not isinstance(info, Obj):
                raise BadPickle("a storage entry is malformed")
            where, what = index.state, info.state
            name = where.get("fqn")
            if type(name) is not str:
                raise BadPickle(f"a storage entry has the name {show(name)}")
            if what.get("transform_descriptors"):
                hint = "save it again without compression extensions"
                raise BadPickle(f"{show(name)} is stored in a transformed (compressed) form", hint)
            whose, start = show(name), where.get("offset")
            key = name, None if start is None else counts(start, f"chunk offset of {whose}")
            if key in out:
                raise BadPickle(f"two storage entries for {whose}, offset {_list(key[1])}")
            file = self._file(what.get("relative_path"), name)
            offset = count(what.get("offset"), f"storage offset of {whose}")
            length = count(what.get("length"), f"storage length of {whose}")
            file.check(offset, length, f"the data of {whose}")
            out[key] = Blob(file, offset, length)
        return out

    def _file(self, name: object, owner: str) -> File:
        if type(name) is str and name in self.files:
            return self.files[name]
        plain = plain_name(name, f"the storage entry of {show(owner)}", self.path)
        if not os.path.lexists(self.folder / plain):
            raise FileError(f"shard {show(plain)} is missing", file=self.path, hint="copy all *.distcp files")
        self.files[plain] = File(self.folder / plain)
        return self.files[plain]

    def _no_overlaps(self, blobs: dict[_Key, Blob]) -> None:
        ordered = sorted(blobs.items(), key=lambda item: (item[1].file.path, item[1].offset, item[1].length))
        for ((one, _), a), ((two, _), b) in itertools.pairwise(ordered):
            if a.file is b.file and b.offset < a.offset + a.length:
                raise FileError(f"the data of {show(one)} and {show(two)} overlap", file=a.file.path, byte=b.offset)

    # ---- tensors

    def _tensor(self, name: str, state: dict[Any, Any], blobs: dict[_Key, Blob]) -> Lazy:
        whose = show(name)
        dtype, shape = _dtype(name, state.get("properties")), counts(state.get("size"), f"size of {whose}")
        chunks, records = [], state.get("chunks")
        if not isinstance(records, (list, tuple)):
            raise BadPickle(f"the chunks of {show(name)} are {show(records)}")
        for record in records:
            fields = record.state if isinstance(record, Obj) else {}
            start = counts(fields.get("offsets"), f"chunk offset of {whose}")
            sizes = counts(fields.get("sizes"), f"chunk size of {whose}")
            if len(start) != len(shape) or len(sizes) != len(shape):
                raise BadPickle(f"a chunk of {show(name)} has {len(sizes)} dimensions, not {len(shape)}")
            blob = blobs.pop((name, start), None)
            if blob is None and not any(start):
                blob = blobs.pop((name, None), None)
            if blob is not None:
                chunks.append(Chunk(start, sizes, partial(_chunk, name, blob, dtype, sizes)))
            elif all(sizes):
                _missing(name, start)
        return Chunked(name, shape, dtype, chunks, self.path)


def _list(start: Shape | None) -> str:
    return "none" if start is None else str(list(start[:8]))


def _missing(name: str, start: Shape | None = None) -> Blob:
    raise BadPickle(f"{show(name)}, chunk at {_list(start)}, has no storage entry", "the save was not completed")


def _dtype(name: str, properties: object) -> str:
    """TensorProperties pickles its state as a tuple that begins with the dtype; older ones as a dict."""
    states = properties.states if isinstance(properties, Obj) else None
    state = states[0] if states else None
    if isinstance(state, dict):
        return dtype_of(state.get("dtype"))
    if isinstance(state, tuple) and state:
        return dtype_of(state[0])
    raise BadPickle(f"the properties of {show(name)} are malformed")


def _chunk(name: str, blob: Blob, dtype: str, sizes: Shape) -> Lazy:
    """The one tensor of a blob, which must be what the metadata say."""
    tensor = blob.open().root
    if not isinstance(tensor, TensorRecord):
        what = f"the data of {show(name)} are {show(tensor)}, not a plain tensor"
        raise FileError(what, file=blob.file.path, byte=blob.offset)
    if tensor.dtype != dtype or tensor.shape != sizes:
        held, said = f"{tensor.dtype}{_list(tensor.shape)}", f"{dtype}{_list(sizes)}"
        what = f"a chunk of {show(name)} is {held}, but the metadata say {said}"
        raise FileError(what, file=blob.file.path, byte=blob.offset, hint="shards of two saves are mixed")
    return tensor


def _described(blob: Blob) -> Any:
    return blob.open().root
