"""Writes the pickle of a torch checkpoint: plain data, and tensors as references to storages, without torch.

    data, tensors = pickle_tree({"model": {"w": lazy}, "step": 7})      # tensors[k] is storage number k

Protocol 2, and of all that a pickle can do only what `torch.load(weights_only=True)` accepts, unless a `Record` asks
for more.  Objects that occur twice in the tree are one object when loaded.  Source of the records: torch/_utils.py,
torch/_tensor.py (`_reduce_ex_internal`), torch/serialization.py (`persistent_id`).
"""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from surgery.containers.pickles.records import STORAGE_DTYPES
from surgery.errors import LayoutError, show
from surgery.tensors.extent import dense_strides
from surgery.tensors.lazy import ITEMSIZE, Lazy

STORAGES = {dtype: name for name, dtype in STORAGE_DTYPES.items() if name != "UntypedStorage"}


@dataclass(frozen=True, eq=False)
class Record:
    """A named thing that loading resolves: the name itself, or (with `args`) the result of calling it.

    Record("torch", "bfloat16")   Record("torch", "Size", ((2, 3),))   Record("argparse", "Namespace", (), {"lr": 1})

    `new`: the class's `__new__` is called instead of the class, so that only `state` fills the instance.
    """

    module: str
    name: str
    args: tuple[Any, ...] | None = None
    state: Any = None
    new: bool = False


def pickle_tree(tree: Any) -> tuple[bytes, list[Lazy]]:
    """The pickle of nested dicts, lists, tuples, numbers, text, bytes, None, Records and lazy tensors.

    Raises LayoutError for anything else.
    """
    pickler = _Pickler()
    try:
        pickler.save(tree)
    except RecursionError:
        raise LayoutError("containers are nested too deep to be written to a torch file") from None
    return b"\x80\x02" + b"".join(pickler.out) + b".", pickler.tensors


class _Pickler:
    def __init__(self) -> None:
        self.out: list[bytes] = []
        self.memo: dict[Any, int] = {}
        self.tensors: list[Lazy] = []
        self.shapes: dict[tuple[int, ...], bytes] = {}

    def save(self, value: Any) -> None:
        write = SAVERS.get(type(value))
        if write is not None:
            write(self, value)
        elif isinstance(value, Lazy):
            self._lazy(value)
        elif isinstance(value, dict):
            self._dict(value)
        else:
            raise LayoutError(f"a {type(value).__name__} cannot be written to a torch file: {show(value)}")

    def put(self, *codes: bytes) -> None:
        self.out += codes

    def known(self, key: Any) -> bool:
        """Refer to what was memoized under `key`, if anything was."""
        at = self.memo.get(key)
        if at is not None:
            self.put(b"h" + bytes([at]) if at < 256 else b"j" + struct.pack("<I", at))
        return at is not None

    def memoize(self, key: Any) -> None:
        at = self.memo[key] = len(self.memo)
        self.put(b"q" + bytes([at]) if at < 256 else b"r" + struct.pack("<I", at))

    def sequence(self, values: tuple[Any, ...]) -> None:
        if len(values) > 3:
            self.put(b"(")
        for value in values:
            self.save(value)
        self.put((b")", b"\x85", b"\x86", b"\x87")[len(values)] if len(values) <= 3 else b"t")

    def name(self, module: str, name: str) -> None:
        if not self.known((module, name)):
            if not all(c.isprintable() for c in module + name):
                raise LayoutError(f"{show(module)} {show(name)} cannot be the name of a class")
            self.put(b"c", module.encode(), b"\n", name.encode(), b"\n")
            self.memoize((module, name))

    def call(self, module: str, name: str, args: tuple[Any, ...]) -> None:
        self.name(module, name)
        self.sequence(args)
        self.put(b"R")

    def _text(self, value: str) -> None:
        if not self.known(value):
            data = value.encode("utf-8", "surrogatepass")
            self.put(b"X", struct.pack("<I", len(data)), data)
            self.memoize(value)

    def _int(self, value: int) -> None:
        if 0 <= value < 256:
            self.put(b"K", bytes([value]))
        elif 0 <= value < 65536:
            self.put(b"M", struct.pack("<H", value))
        elif -(1 << 31) <= value < 1 << 31:
            self.put(b"J", struct.pack("<i", value))
        else:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            head = b"\x8a" + bytes([len(data)]) if len(data) < 256 else b"\x8b" + struct.pack("<I", len(data))
            self.put(head, data)

    def _dict(self, value: dict[Any, Any]) -> None:
        if self.known(id(value)):
            return
        if isinstance(value, OrderedDict):
            self.call("collections", "OrderedDict", ())
        else:
            self.put(b"}")
        self.memoize(id(value))
        if value:
            self.put(b"(")
            for key, item in value.items():
                self.save(key)
                self.save(item)
            self.put(b"u")

    def _list(self, value: list[Any]) -> None:
        if self.known(id(value)):
            return
        self.put(b"]")
        self.memoize(id(value))
        if value:
            self.put(b"(")
            for item in value:
                self.save(item)
            self.put(b"e")

    def _record(self, value: Record) -> None:
        if value.args is None:
            self.name(value.module, value.name)
        elif not self.known(id(value)):
            self.name(value.module, value.name)
            self.sequence(value.args)
            self.put(b"\x81" if value.new else b"R")
            self.memoize(id(value))
            if value.state is not None:
                self.save(value.state)
                self.put(b"b")

    def _lazy(self, tensor: Lazy) -> None:
        """_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks), v3 for untyped storages."""
        if self.known(id(tensor)):  # the tree keeps it alive, so no other object has its id
            return
        typed = tensor.dtype in STORAGES
        self.name("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
        self.put(b"((")
        self._text("storage")
        self.name(*(("torch", STORAGES[tensor.dtype]) if typed else ("torch.storage", "UntypedStorage")))
        self._text(str(len(self.tensors)))
        self._text("cpu")
        self._int(math.prod(tensor.shape) * (1 if typed else ITEMSIZE[tensor.dtype]))
        self.put(b"tQ", self._geometry(tensor.shape))
        self.tensors.append(tensor)
        self.call("collections", "OrderedDict", ())
        if not typed:
            self.name("torch", tensor.dtype)
        self.put(b"tR")
        self.memoize(id(tensor))

    def _geometry(self, shape: tuple[int, ...]) -> bytes:
        """Offset, shape, strides and requires_grad: the same bytes for every tensor of a shape."""
        if shape not in self.shapes:
            alone = _Pickler()
            for value in (0, shape, _strides(shape), False):
                alone.save(value)
            self.shapes[shape] = b"".join(alone.out)
        return self.shapes[shape]


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """What torch calls contiguous: an empty dimension counts as one."""
    return dense_strides([max(n, 1) for n in shape])


def _bytes(pickler: _Pickler, value: bytes) -> None:
    pickler.call("_codecs", "encode", (value.decode("latin1"), "latin1"))


SAVERS: dict[type, Callable[[_Pickler, Any], None]] = {
    type(None): lambda p, v: p.put(b"N"),
    bool: lambda p, v: p.put(b"\x88" if v else b"\x89"),
    int: _Pickler._int,
    float: lambda p, v: p.put(b"G", struct.pack(">d", v)),
    str: _Pickler._text,
    bytes: _bytes,
    tuple: _Pickler.sequence,
    list: _Pickler._list,
    dict: _Pickler._dict,
    OrderedDict: _Pickler._dict,
    Record: _Pickler._record,
}
