"""The state of the inert pickle machine, and the few operations that its opcodes share.

    machine = Machine(data, start=0, persistent=True, limits=Limits())
    machine.reduce(Global("posix", "system"), ("true",))      # an Obj: nothing is called

Every length is checked against the bytes that are left, the objects that a pickle may create are bounded by its
size, and dictionary keys are restricted to what hashes quickly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from surgery.containers.pickles.allowed import ALLOWED, fill_array
from surgery.containers.pickles.records import (
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

_DICTS = frozenset({"collections.OrderedDict", "collections.Counter", "collections.defaultdict"})
# Python 2's names for what moved (protocols 0 to 2), as in the standard library's _compat_pickle
_MOVED_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "cPickle": "pickle"}
_MOVED_NAMES = {
    "xrange": ("builtins", "range"),
    "unicode": ("builtins", "str"),
    "long": ("builtins", "int"),
    "reduce": ("functools", "reduce"),
}
NAME_LIMIT = 1024  # characters of a module or of a name
_KEY_DEPTH = 4  # tuples in tuples in a dictionary key
_TUPLE_KEYS = 4096  # tuples hash alike if a file wants them to: then each costs a comparison with all before
HALF_DONE = "the file is truncated or damaged; copy or download it again"


@dataclass(frozen=True)
class Limits:
    """What one pickle may cost.  Objects: `budget` + `ratio` bytes per byte of pickle, at most `ceiling`.

    Measured need: 18 bytes of objects per byte of a torch state dict, 34 for the metadata of a DCP folder.
    """

    pickle_bytes: int = 256 << 20
    budget: int = 32 << 20
    ratio: int = 48
    ceiling: int = 6 << 30


class Machine:
    """Stack, marks, memo and what has been found so far."""

    __slots__ = (
        "at", "budget", "buf", "globals", "limits", "memo", "meta", "persistent", "protocol", "root", "size", "spent",
        "stack", "storages", "tensors", "tuple_keys",
    )  # fmt: skip

    def __init__(self, data: bytes, start: int, persistent: bool, limits: Limits) -> None:
        self.buf, self.size, self.at, self.limits, self.persistent = data, len(data), start, limits, persistent
        self.budget = min(limits.budget + limits.ratio * len(data), limits.ceiling)
        self.spent = self.protocol = self.tuple_keys = 0
        self.stack: list[Any] = []
        self.meta: list[list[Any]] = []  # stacks below the open marks
        self.memo: dict[int, Any] = {}
        self.globals: dict[tuple[str, str], Global] = {}
        self.storages: dict[str, Storage] = {}
        self.tensors: list[TensorRecord] = []
        self.root: Any = None

    # ---- limits

    def charge(self, size: int) -> None:
        """Account for about `size` bytes of objects."""
        self.spent += size
        if self.spent > self.budget:
            raise BadPickle(
                f"this pickle describes objects of more than {self.budget >> 20} MiB",
                "no checkpoint needs that many objects for its size; the file is hostile or damaged",
            )

    def take(self, pos: int, size: int, what: str) -> bytes:
        """`size` bytes at `pos`, checked before anything is allocated."""
        if size > self.size - pos:
            left = self.size - pos
            raise BadPickle(f"{what} of {size} bytes goes past the end of the pickle ({left} left)", HALF_DONE)
        if size > 64:
            self.charge(size)
        self.spent += 56
        return self.buf[pos : pos + size]

    def line(self, pos: int) -> tuple[bytes, int]:
        """A text argument up to its newline, and the position after it."""
        end = self.buf.find(b"\n", pos, pos + NAME_LIMIT + 1)
        if end < 0:
            if self.size - pos <= NAME_LIMIT:
                raise BadPickle("the pickle ends inside a text argument", HALF_DONE)
            raise BadPickle(f"a text argument is longer than {NAME_LIMIT} bytes")
        self.spent += 56
        return self.buf[pos:end], end + 1

    # ---- names and calls

    def name(self, module: object, name: object) -> Global:
        """The one Global of that name."""
        if type(module) is not str or type(name) is not str:
            raise BadPickle("the name of a global is not text")
        if len(module) > NAME_LIMIT or len(name) > NAME_LIMIT:
            raise BadPickle(f"the name of a global is longer than {NAME_LIMIT} characters")
        if self.protocol < 3:
            if module == "__builtin__" and name in _MOVED_NAMES:
                module, name = _MOVED_NAMES[name]
            module = _MOVED_MODULES.get(module, module)
        found = self.globals.get((module, name))
        if found is None:
            self.charge(300 + 2 * len(module) + 2 * len(name))
            found = self.globals[module, name] = Global(module, name)
        return found

    def reduce(self, fn: object, args: object) -> Any:
        """What `fn(*args)` would be: a known record, or the call itself."""
        if type(args) is not tuple:
            raise BadPickle(f"the arguments of a call are {show(args)}, not a tuple")
        self.spent += 160
        if type(fn) is Global:
            known = ALLOWED.get(fn.path)
            made = known(self, args) if known else None
            if made is not None:
                if type(made) is TensorRecord:
                    self.tensors.append(made)
                return made
        elif type(fn) is not Obj:
            raise BadPickle(f"a call of {show(fn)}, which is not callable")
        return Obj("call", fn, args, self.at)

    def new(self, cls: object, args: object, kwargs: object = None) -> Any:
        """An instance of `cls`, undescribed but for its arguments."""
        self.spent += 160
        if type(cls) is not Global and type(cls) is not Obj:
            raise BadPickle(f"an instance of {show(cls)}, which is not a class")
        if type(args) is not tuple:
            raise BadPickle(f"the arguments of a new object are {show(args)}, not a tuple")
        if type(cls) is Global and cls.path in _DICTS and not args and not kwargs:
            return Dict()
        return Obj("new", cls, args, self.at, kwargs)

    # ---- containers

    def check_key(self, key: object, depth: int = 0) -> None:
        """Keys must hash fast and without recursion, whatever the file holds."""
        kind = type(key)
        if kind is int:
            assert isinstance(key, int)
            if not -1 << 60 < key < 1 << 60:  # from 2^61 - 1 on, many integers share one hash
                raise BadPickle(f"dictionary key {show(key)} is too large")
        elif kind is tuple:
            assert isinstance(key, tuple)
            self.tuple_keys += 1
            if depth >= _KEY_DEPTH or len(key) > 64 or self.tuple_keys > _TUPLE_KEYS:
                raise BadPickle("a dictionary key is a tuple nested too deeply, too long, or one of too many")
            for item in key:
                self.check_key(item, depth + 1)
        elif key is not None and kind not in (str, bytes, bool, Global, Obj, TensorRecord, Storage):
            raise BadPickle(f"a dictionary key is {show(key)}")

    def set_items(self, target: object, items: list[Any]) -> None:
        """target[key] = value for key, value, key, value, ..."""
        if len(items) % 2:
            raise BadPickle("an odd number of items for a dictionary")
        self.spent += 50 * len(items)
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                if type(key) is not str:
                    self.check_key(key)
                if key in target:
                    raise BadPickle(
                        f"dictionary key {show(key)} appears twice", "two values under one name: the file is ambiguous"
                    )
                target[key] = value
        elif type(target) is Obj:
            target.pairs = target.pairs or []
            target.pairs.extend(zip(items[::2], items[1::2], strict=True))
        else:
            raise BadPickle(f"items are set on {show(target)}, which is not a dictionary")

    def append(self, target: object, items: list[Any]) -> None:
        """target.append(item) for each item"""
        self.spent += 10 * len(items)
        if type(target) is list or type(target) is Set:
            target.extend(items)
        elif type(target) is Obj:
            target.items = target.items or []
            target.items.extend(items)
        else:
            raise BadPickle(f"items are appended to {show(target)}, which is not a list")

    def build(self, target: object, state: Any) -> None:
        """What `target.__setstate__(state)` would be told."""
        self.spent += 64
        pair = state if type(state) is tuple and len(state) == 2 else (state, None)
        if type(target) is Obj:
            target.states = target.states or []
            target.states.append(state)
        elif isinstance(target, (Dict, TensorRecord)):
            attrs = pair[0] if pair[0] is not None else pair[1]
            if not isinstance(attrs, dict):
                raise BadPickle(f"the state of a {type(target).__name__} is {show(state)}, not a dictionary")
            target.attrs = attrs
        elif type(target) is NumpyDtype:
            if type(state) is tuple and len(state) > 1 and state[1] in ("<", ">", "=", "|"):
                target.order = ">" if state[1] == ">" else "<"
        elif type(target) is NumpyArray:
            if type(state) is not tuple or len(state) != 5 or target.shape is not None:
                raise BadPickle("the state of a numpy array is malformed")
            if not fill_array(target, state[1], state[2], bool(state[3]), state[4]):
                target.state = state
        else:
            raise BadPickle(f"a state is set on {show(target)}")
