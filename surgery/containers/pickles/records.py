"""What a pickle said, as inert data: names, calls, storages, tensors.  Nothing here is ever imported or called.

    record = describe(data, file="x.pt").root["args"]     # Obj for argparse.Namespace
    record.path, record.state["num_layers"]               # "argparse.Namespace", 32

Records compare and hash by identity, so a hostile file cannot make comparing them expensive.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any

from surgery.errors import show
from surgery.tensors.extent import Extent
from surgery.tensors.files import File
from surgery.tensors.lazy import ITEMSIZE

# name of a torch storage class -> the dtype of its elements
STORAGE_DTYPES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8",
}  # fmt: skip
STORAGE_MODULES = frozenset({"torch", "torch.storage", "torch.cuda"})

MAX_PATH = 4096  # characters of a dotted path

_STRUCT = {
    ("f", 8): "d", ("f", 4): "f", ("f", 2): "e", ("b", 1): "?",
    ("i", 8): "q", ("i", 4): "i", ("i", 2): "h", ("i", 1): "b",
    ("u", 8): "Q", ("u", 4): "I", ("u", 2): "H", ("u", 1): "B",
}  # fmt: skip


class BadPickle(Exception):
    """A pickle breaks a rule; `describe` adds the file and the byte and raises FileError."""

    def __init__(self, what: str, hint: str | None = None) -> None:
        super().__init__(what)
        self.what, self.hint = what, hint


class Global:
    """A dotted name found in a pickle.  It is never resolved.  One instance per name and pickle."""

    __slots__ = ("module", "name", "path")

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name, self.path = module, name, f"{module}.{name}"

    def __repr__(self) -> str:
        return f"<global {ascii(self.path)[1:-1]}>"


class Obj:
    """A call or an instance that the pickle describes and nobody made.

    kind     "call" (REDUCE), "new" (NEWOBJ and the like) or "module" (a pickled nn.Module's source)
    fn       what would be called: a Global, or another Obj (getattr chains, partials)
    args     tuple of positional arguments;  kwargs  dict or None
    states   list of BUILD states;  items  list of appended items;  pairs  list of (key, value) items
    at       byte in the pickle where it was described
    """

    __slots__ = ("args", "at", "fn", "items", "kind", "kwargs", "pairs", "states")

    def __init__(self, kind: str, fn: object, args: tuple[Any, ...], at: int, kwargs: Any = None) -> None:
        self.kind, self.fn, self.args, self.at, self.kwargs = kind, fn, args, at, kwargs
        self.states: list[Any] | None = None
        self.items: list[Any] | None = None
        self.pairs: list[tuple[Any, Any]] | None = None

    @property
    def path(self) -> str:
        """Dotted name of what would be called; "?" if that is itself the result of a call."""
        return self.fn.path if isinstance(self.fn, Global) else "?"

    @property
    def basename(self) -> str:
        """Last part of `path`: classes move between modules, their names stay."""
        return self.path.rpartition(".")[2]

    @property
    def state(self) -> dict[Any, Any]:
        """The attributes that BUILD would set: `(dict, slots)` states merged, later ones win; {} when none."""
        out: dict[Any, Any] = {}
        for state in self.states or ():
            parts = state if type(state) is tuple and len(state) == 2 else (state,)
            for part in parts:
                if isinstance(part, dict):
                    out.update(part)
        return out

    def __repr__(self) -> str:
        return f"<{self.kind} {ascii(self.path)[1:-1]}>"


class Dict(dict[Any, Any]):
    """An OrderedDict, Counter or defaultdict, read as a plain dict; `attrs` holds e.g. `_metadata`."""

    __slots__ = ("attrs",)
    attrs: dict[Any, Any] | None

    def __init__(self) -> None:
        super().__init__()
        self.attrs = None


class Set(list[Any]):
    """A set or frozenset, read as a list: elements of a hostile set are never hashed."""

    __slots__ = ()


class Storage:
    """A run of elements that lies elsewhere in the container: `numel` elements of `dtype` under `key`.

    `start` is the first element inside the storage `key` (not 0 only for storage views of legacy files).
    """

    __slots__ = ("dtype", "key", "name", "numel", "start")

    def __init__(self, key: str, name: str, numel: int, start: int = 0) -> None:
        self.key, self.name, self.dtype, self.numel, self.start = key, name, STORAGE_DTYPES[name], numel, start

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]

    def __repr__(self) -> str:
        return f"<storage {show(self.key)} {self.name}[{self.numel}]>"


class TensorRecord(Extent):
    """A plain tensor of a pickle.  It becomes readable when the container has `place`d its storage in a file.

    Identity matters: two names that share one record were one tensor object when the file was written.
    """

    __slots__ = ("attrs", "start", "storage")

    def __init__(
        self, storage: Storage, dtype: str, start: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> None:
        # the base class is initialised by `place`: until then there is no file to check against
        self.storage, self.dtype, self.start, self.shape, self.strides = storage, dtype, start, shape, strides
        self.attrs: object = None

    def place(self, file: File, offset: int, swap: bool) -> None:
        """Say where the storage's element 0 lies."""
        offset += self.storage.start * ITEMSIZE[self.storage.dtype] + self.start * ITEMSIZE[self.dtype]
        super().__init__(file, offset, self.shape, self.dtype, self.strides, swap)


class NumpyDtype:
    """A numpy dtype: `code` ("f", "i", "u", "b", "c") and `size` in bytes, or code "" for one that is not numeric."""

    __slots__ = ("code", "order", "size")

    def __init__(self, code: str, size: int) -> None:
        self.code, self.size, self.order = code, size, "<"

    def unpack(self, data: bytes) -> Iterator[Any]:
        """The elements as Python numbers; nothing for kinds that Python has no number for."""
        letter = _STRUCT.get((self.code, self.size))
        if letter is None:
            return iter(())
        fmt = struct.Struct((">" if self.order == ">" else "<") + letter)
        return (value for (value,) in fmt.iter_unpack(data))


class NumpyArray:
    """A numpy array held by a pickle: its bytes, undecoded.  `shape` is None for arrays that are not numeric."""

    __slots__ = ("data", "dtype", "fortran", "shape", "state")

    def __init__(self) -> None:
        self.dtype: NumpyDtype | None = None
        self.shape: tuple[int, ...] | None = None
        self.fortran, self.data = False, b""
        self.state: object = None  # what the pickle said, where that is no plain numeric array

    def values(self) -> list[Any]:
        """The elements, flat, in the order in which they are stored."""
        return list(self.dtype.unpack(self.data)) if self.dtype else []

    def __repr__(self) -> str:
        return f"<numpy array {list(self.shape or ())}>"


def flatten(root: object, depth_limit: int = 64) -> Iterator[tuple[str, Any]]:
    """(dotted path, leaf) of every leaf below nested dicts, lists and tuples, front to back.

    Raises ValueError if containers are nested too deep or a shared one unfolds into too many leaves, as a
    structure that contains itself would.
    """
    todo: list[tuple[str, Any, int]] = [("", root, 0)]
    met: set[int] = set()
    visits = distinct = 0
    while todo:
        path, node, depth = todo.pop()
        if not isinstance(node, (dict, list, tuple)):
            yield path, node
            continue
        visits += len(node)
        if id(node) not in met:
            met.add(id(node))
            distinct += len(node)
        if depth >= depth_limit or visits > 100_000 + 8 * distinct:
            raise ValueError(f"dicts and lists are nested too deeply or repeated without end at {show(path)}")
        pairs: Iterable[tuple[Any, Any]] = node.items() if isinstance(node, dict) else enumerate(node)
        below = [(_join(path, key), value, depth + 1) for key, value in pairs]
        todo.extend(reversed(below))


def _join(path: str, key: object) -> str:
    text = key if type(key) is str else show(key)
    if len(path) + len(text) > MAX_PATH:
        raise ValueError(f"a name of more than {MAX_PATH} characters begins with {show(path or text)}")
    return f"{path}.{text}" if path else text
