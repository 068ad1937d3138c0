"""The names that a pickle may give a meaning to, and nothing else: pure functions of checked arguments.

    ALLOWED["torch._utils._rebuild_tensor_v2"](machine, args)     # -> TensorRecord

Each takes the machine and the argument tuple of a REDUCE and returns plain data or a record, or None where the
arguments are not of the usual form (the call then stays an inert `Obj`).  Sources of the argument orders:
torch/_utils.py, torch/_tensor.py, torch/serialization.py, numpy/core/multiarray.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

from surgery.containers.pickles.records import (
    STORAGE_DTYPES,
    STORAGE_MODULES,
    BadPickle,
    Dict,
    Global,
    NumpyArray,
    NumpyDtype,
    Obj,
    Set,
    Storage,
    TensorRecord,
)
from surgery.errors import show
from surgery.tensors.lazy import ITEMSIZE


class Machine(Protocol):
    """What these functions ask of the machine that reads the pickle."""

    storages: dict[str, Storage]

    def charge(self, size: int) -> None:
        """Account for about `size` bytes of objects."""

    def set_items(self, target: object, items: list[Any]) -> None:
        """target[key] = value for key, value, key, value, ..."""


Allowed = Callable[[Machine, tuple[Any, ...]], Any]
MAX_DIMS = 64
_LATIN = ("latin1", "latin-1", b"latin1")
_PLAIN_REBUILD = frozenset(
    f"torch._utils._rebuild_{name}" for name in ("tensor_v2", "tensor_v3", "parameter", "parameter_with_state")
)


def count(value: object, what: str) -> int:
    """`value` if it is an integer in [0, 2^63): never a bool, never a float."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise BadPickle(f"{what} is {show(value)}, not an integer in [0, 2^63)")
    return value


def counts(value: object, what: str) -> tuple[int, ...]:
    """A shape, strides or offsets: at most 64 integers in [0, 2^63)."""
    if type(value) not in (tuple, list):
        raise BadPickle(f"{what} is {show(value)}, not a tuple of integers")
    assert isinstance(value, (tuple, list))
    if len(value) > MAX_DIMS:
        raise BadPickle(f"{what} has {len(value)} dimensions, more than {MAX_DIMS}")
    for n in value:
        if type(n) is not int or not 0 <= n < 1 << 63:
            count(n, what)
    return tuple(value)


def dtype_of(value: object) -> str:
    """The dtype that a Global names, from a table: nothing is looked up in torch."""
    if isinstance(value, Global) and value.module == "torch" and value.name in ITEMSIZE:
        return value.name
    named = show(value.path) if isinstance(value, Global) else show(value)
    raise BadPickle(f"unknown dtype {named}", "supported: " + ", ".join(sorted(ITEMSIZE)))


def _tensor(args: tuple[Any, ...], dtype: str | None, metadata: int) -> Any:
    storage, start = args[0], count(args[1], "storage offset of a tensor")
    if not isinstance(storage, Storage):
        raise BadPickle(f"a tensor points to {show(storage)} instead of a storage")
    shape, strides = counts(args[2], "tensor shape"), counts(args[3], "tensor strides")
    if len(shape) != len(strides):
        raise BadPickle(f"a tensor has {len(shape)} dimensions but {len(strides)} strides")
    dtype = dtype or storage.dtype
    if all(shape):
        last = start + sum([(n - 1) * s for n, s in zip(shape, strides, strict=True)])
        if (last + 1) * ITEMSIZE[dtype] > storage.nbytes:
            raise BadPickle(
                f"tensor of shape {show_ints(shape)} strides {show_ints(strides)} offset {start} ({dtype}) needs "
                f"{show((last + 1) * ITEMSIZE[dtype])} bytes but storage {show(storage.key)} has {storage.nbytes}",
                "the file is damaged or was not written by torch.save",
            )
    if len(args) > metadata and args[metadata] and _is_lazy_view(args[metadata]):
        return None  # its value is not what is stored: keep the call, do not pass it off as a plain tensor
    return TensorRecord(storage, dtype, start, shape, strides)


def show_ints(numbers: tuple[int, ...]) -> str:
    """A shape for a message: at most eight numbers."""
    text = ", ".join(map(str, numbers[:8]))
    return f"[{text}, ...]" if len(numbers) > 8 else f"[{text}]"


def _is_lazy_view(flags: object) -> bool:
    """torch's {"conj": True, "neg": True}: the stored elements still have to be conjugated or negated."""
    if type(flags) is not dict or any(k not in ("conj", "neg") or type(v) is not bool for k, v in flags.items()):
        raise BadPickle(f"unknown tensor metadata {show(flags)}")
    return any(flags.values())


def _need(args: tuple[Any, ...], least: int) -> None:
    if len(args) < least:
        raise BadPickle(f"a tensor record has {len(args)} arguments, expected at least {least}")


def tensor_v1(m: Machine, args: tuple[Any, ...]) -> Any:
    """storage, offset, shape, strides"""
    _need(args, 4)
    return _tensor(args[:4], None, 5)


def tensor_v2(m: Machine, args: tuple[Any, ...]) -> Any:
    """storage, offset, shape, strides, requires_grad, backward_hooks[, metadata]"""
    _need(args, 6)
    return _tensor(args, None, 6)


def tensor_v3(m: Machine, args: tuple[Any, ...]) -> Any:
    """as v2, then the dtype: storages of newer dtypes are untyped, their sizes in bytes"""
    _need(args, 7)
    return _tensor(args, dtype_of(args[6]), 7)


def parameter(m: Machine, args: tuple[Any, ...]) -> Any:
    """tensor, requires_grad, backward_hooks[, state]"""
    if not args or not isinstance(args[0], TensorRecord):
        return None
    record = args[0]
    if len(args) > 3:
        record.attrs = args[3]
    return record


def from_type(m: Machine, args: tuple[Any, ...]) -> Any:
    """function, type, its arguments, state: tensors that carry Python attributes"""
    if len(args) != 4 or not isinstance(args[0], Global) or type(args[2]) is not tuple:
        raise BadPickle("a _rebuild_from_type_v2 record is malformed")
    if args[0].path not in _PLAIN_REBUILD:
        return None
    record = ALLOWED[args[0].path](m, args[2])
    if isinstance(record, TensorRecord):
        record.attrs = args[3]
        return record
    return None


def ordered_dict(m: Machine, args: tuple[Any, ...]) -> Any:
    """OrderedDict() or OrderedDict([[key, value], ...])"""
    out = Dict()
    if not args:
        return out
    pairs = list(args[0].items()) if isinstance(args[0], dict) else args[0]
    if len(args) != 1 or not isinstance(pairs, list):
        return None
    flat: list[Any] = []
    for pair in pairs:
        if type(pair) not in (list, tuple) or len(pair) != 2:
            raise BadPickle("an OrderedDict item is not a pair")
        flat += pair
    m.set_items(out, flat)
    return out


def default_dict(m: Machine, args: tuple[Any, ...]) -> Any:
    """defaultdict(factory): the factory is dropped"""
    return Dict() if len(args) <= 1 else None


def encode(m: Machine, args: tuple[Any, ...]) -> Any:
    """_codecs.encode(text, "latin1"): how protocol 2 spells bytes"""
    if len(args) != 2 or type(args[0]) is not str or args[1] not in _LATIN:
        return None
    m.charge(len(args[0]))
    try:
        return args[0].encode("latin-1")
    except UnicodeEncodeError:
        raise BadPickle("a bytes record holds characters above 255") from None


def to_bytes(m: Machine, args: tuple[Any, ...]) -> Any:
    """bytes(), bytes(b"...")"""
    if not args:
        return b""
    return args[0] if len(args) == 1 and type(args[0]) is bytes else None


def to_bytearray(m: Machine, args: tuple[Any, ...]) -> Any:
    """bytearray(b"..."), bytearray(text, "latin-1")"""
    return encode(m, args) if len(args) == 2 else to_bytes(m, args)


def to_set(m: Machine, args: tuple[Any, ...]) -> Any:
    """set([...]), frozenset([...])"""
    if not args:
        return Set()
    if len(args) != 1 or not isinstance(args[0], (list, tuple)):
        return None
    m.charge(8 * len(args[0]))
    return Set(args[0])


def size(m: Machine, args: tuple[Any, ...]) -> Any:
    """torch.Size((...)): a plain tuple"""
    if len(args) > 1:
        return None
    return counts(args[0], "torch.Size") if args else ()


def numpy_dtype(m: Machine, args: tuple[Any, ...]) -> Any:
    """dtype("f4", align, copy); its byte order follows in a BUILD"""
    if not args or type(args[0]) is not str or len(args[0]) > 16:
        return None
    text = args[0].lstrip("<>|=")
    digits = text[1:]
    if text[:1] and text[0] in "fiubc" and digits in ("1", "2", "4", "8", "16"):
        dtype = NumpyDtype(text[0], int(digits))
        dtype.order = ">" if args[0].startswith(">") else "<"
        return dtype
    return NumpyDtype("", 0)


def numpy_scalar(m: Machine, args: tuple[Any, ...]) -> Any:
    """scalar(dtype, bytes): a plain Python number"""
    if len(args) != 2 or not isinstance(args[0], NumpyDtype) or type(args[1]) is not bytes:
        return None
    values = list(args[0].unpack(args[1])) if len(args[1]) == args[0].size else []
    return values[0] if len(values) == 1 else None


def numpy_reconstruct(m: Machine, args: tuple[Any, ...]) -> Any:
    """_reconstruct(ndarray, (0,), b"b"): an empty array that a BUILD fills"""
    return NumpyArray()


def numpy_frombuffer(m: Machine, args: tuple[Any, ...]) -> Any:
    """_frombuffer(bytes, dtype, shape, order): protocol 5"""
    if len(args) != 4 or type(args[0]) is not bytes or args[3] not in ("C", "F"):
        return None
    array = NumpyArray()
    return array if fill_array(array, args[2], args[1], args[3] == "F", args[0]) else None


def fill_array(array: NumpyArray, shape: object, dtype: object, fortran: bool, data: object) -> bool:
    """Set the fields of a numeric array after checking that the bytes fit the shape; False if it is not numeric."""
    if not isinstance(dtype, NumpyDtype) or not dtype.code or type(data) is not bytes:
        return False
    dims = counts(shape, "numpy shape")
    need = math.prod(dims) * dtype.size
    if need != len(data):
        raise BadPickle(f"numpy array of shape {show_ints(dims)} needs {show(need)} bytes, has {len(data)}")
    array.shape, array.dtype, array.fortran, array.data = dims, dtype, fortran, data
    return True


def storage(m: Machine, pid: object) -> Any:
    """A persistent id: ("storage", class, key, location, elements[, view]); legacy files also ("module", ...)."""
    tag = pid[0] if type(pid) is tuple and pid else pid
    if type(pid) is not tuple or len(pid) < 5 or tag not in ("storage", b"storage"):
        if type(pid) is tuple and tag == "module" and len(pid) > 1:
            return Obj("module", pid[1], (), 0)
        raise BadPickle(f"unknown persistent id {show(tag)}")
    _, cls, key, _, numel = pid[:5]
    if not isinstance(cls, Global) or cls.module not in STORAGE_MODULES or cls.name not in STORAGE_DTYPES:
        named = show(cls.path) if isinstance(cls, Global) else show(cls)
        raise BadPickle(f"unknown storage type {named}", "supported: " + ", ".join(sorted(STORAGE_DTYPES)))
    key = str(key) if type(key) is int and 0 <= key < 1 << 63 else key
    if type(key) is not str or not 0 < len(key) <= 256:
        raise BadPickle(f"bad storage key {show(key)}")
    found = Storage(key, cls.name, count(numel, f"element count of storage {show(key)}"))
    first = m.storages.setdefault(key, found)
    if (first.name, first.numel) != (found.name, found.numel):
        raise BadPickle(f"storage {show(key)} is declared as {found!r} and before as {first!r}")
    m.charge(300)
    return _storage_view(first, pid[5]) if len(pid) > 5 and pid[5] is not None else first


def _storage_view(root: Storage, view: object) -> Storage:
    """(key, offset, elements): a part of a storage, in files of old torch releases"""
    if type(view) is not tuple or len(view) != 3:
        raise BadPickle("a storage view is malformed")
    start, numel = count(view[1], "storage view offset"), count(view[2], "storage view size")
    if start + numel > root.numel:
        raise BadPickle(f"a storage view of {numel} elements from {start} on lies outside {root!r}")
    return Storage(root.key, root.name, numel, start)


ALLOWED: dict[str, Allowed] = {
    "torch._utils._rebuild_tensor": tensor_v1,
    "torch._utils._rebuild_tensor_v2": tensor_v2,
    "torch._utils._rebuild_tensor_v3": tensor_v3,
    "torch._utils._rebuild_parameter": parameter,
    "torch._utils._rebuild_parameter_with_state": parameter,
    "torch._tensor._rebuild_from_type_v2": from_type,
    "torch.Size": size,
    "collections.OrderedDict": ordered_dict,
    "collections.Counter": ordered_dict,
    "collections.defaultdict": default_dict,
    "_codecs.encode": encode,
    "builtins.bytes": to_bytes,
    "builtins.bytearray": to_bytearray,
    "builtins.set": to_set,
    "builtins.frozenset": to_set,
    "numpy.dtype": numpy_dtype,
}
for _core in ("numpy.core", "numpy._core"):
    ALLOWED |= {
        f"{_core}.multiarray.scalar": numpy_scalar,
        f"{_core}.multiarray._reconstruct": numpy_reconstruct,
        f"{_core}.numeric._frombuffer": numpy_frombuffer,
    }
