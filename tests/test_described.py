"""Pickles as data: what plain values, records, arrays and tensors come out as, and that nothing is called."""

from __future__ import annotations

import argparse
import collections
import enum
import pickle
import pickletools
import signal
import subprocess
import sys
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pytest

from attacks.build import WEIGHT, b, call, d, g, i, pkl, storage, t, tensor, u
from surgery.containers.pickles.describe import Limits, Truncated, describe
from surgery.containers.pickles.records import Dict, Global, NumpyArray, Obj, TensorRecord, flatten
from surgery.errors import FileError

PROTOCOLS = range(6)
PLAIN = {
    "numbers": [0, 1, 255, 256, 65535, 65536, -1, -(1 << 31), 1 << 31, 1 << 62, -(1 << 70), 0.0, -1.5, float("inf")],
    "texts": ["", "x", "y" * 300, "\u20ac\U0001f600\n'\"\\", "\x00"],
    "bytes": [b"", b"\0\xff", b"z" * 300],
    "constants": [None, True, False],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((), ((),))],
    "nested": {"a": {"b": [{}, [], {"c": 1}]}, 7: "seven", None: 0, (1, "t"): 2, b"k": 3, True: 4},
}


def root_of(data: bytes, **more: Any) -> Any:
    return describe(data, file="x.pkl", **more).root


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", PLAIN)
def test_plain_values_come_out_as_pickle_gives_them(name: str, protocol: int) -> None:
    value = PLAIN[name]
    for data in (pickle.dumps(value, protocol), pickletools.optimize(pickle.dumps([value, value], protocol))):
        assert repr(root_of(data)) == repr(pickle.loads(data))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_sharing_is_kept(protocol: int) -> None:
    inner: list[int] = [1]
    root = root_of(pickle.dumps({"a": inner, "b": inner, "c": (inner, inner)}, protocol))
    assert root["a"] is root["b"] is root["c"][0] is root["c"][1]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_dictionaries_and_sets_of_the_library(protocol: int) -> None:
    value = {
        "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
        "default": collections.defaultdict(list, {"k": [1]}),
        "counter": collections.Counter("aab"),
        "set": {1},
        "frozen": frozenset([2]),
        "array": bytearray(b"ab"),
    }
    root = root_of(pickle.dumps(value, protocol))
    assert list(root["ordered"].items()) == [("b", 1), ("a", 2)] and isinstance(root["ordered"], Dict)
    assert root["default"] == {"k": [1]} and root["counter"] == {"a": 2, "b": 1}
    assert root["set"] == [1] and root["frozen"] == [2] and root["array"] == b"ab"


class Color(enum.Enum):
    RED = 3


class Slotted:
    __slots__ = ("a", "b")

    def __init__(self) -> None:
        self.a, self.b = 1, [2]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects_become_records(protocol: int) -> None:
    value = {
        "args": argparse.Namespace(lr=0.1, layers=[1, 2]),
        "color": Color.RED,
        "signal": signal.SIGTERM,
        "path": PurePosixPath("/a/b"),
        "complex": 1 + 2j,
        "slots": Slotted(),
        "range": range(3),
    }
    found = describe(pickle.dumps(value, protocol), file="x")
    root = found.root
    assert root["args"].path == "argparse.Namespace" and root["args"].state == {"lr": 0.1, "layers": [1, 2]}
    assert root["color"].basename == "Color" and root["color"].args == (3,)
    assert root["path"].args == ("/", "a", "b")
    assert root["complex"].path == "builtins.complex" and root["complex"].args == (1.0, 2.0)
    assert root["slots"].state == {"a": 1, "b": [2]}
    assert root["range"].args == (0, 3, 1)
    assert {"argparse.Namespace", "builtins.complex", "builtins.range"} <= set(found.globals)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?", ">f4", ">i8"])
def test_numpy_numbers(dtype: str, protocol: int) -> None:
    array = np.array([[1, 0, 1], [0, 1, 1]], dtype)
    value = {"scalar": array[0, 0], "array": array, "fortran": np.asfortranarray(array), "dtype": array.dtype}
    root = root_of(pickle.dumps(value, protocol))
    assert root["scalar"] == 1
    assert isinstance(root["array"], NumpyArray)
    assert root["array"].shape == (2, 3) and root["array"].values() == array.ravel().tolist()
    assert root["fortran"].fortran and root["fortran"].values() == array.T.ravel().tolist()


def test_numpy_arrays_that_are_not_numeric_stay_opaque() -> None:
    root = root_of(pickle.dumps([np.array(["a", None], object), np.zeros(2, "f4,i4")]))
    assert all(isinstance(array, NumpyArray) and array.shape is None and array.values() == [] for array in root)


def test_old_numpy_and_new_numpy_names() -> None:
    for core in ("numpy.core", "numpy._core"):
        body = call(g(f"{core}.multiarray.scalar"), call(g("numpy.dtype"), u("i4")), b(b"\5\0\0\0"))
        assert root_of(pkl(body, 3)) == 5


def test_tensors_are_described_and_have_no_place_yet() -> None:
    found = describe(pkl(d((u("w"), WEIGHT), (u("v"), tensor(storage("0", 8), 2, (2, 3), (3, 1))))), file="x")
    weight, view = found.root["w"], found.root["v"]
    assert isinstance(weight, TensorRecord) and (weight.shape, weight.dtype) == ((8,), "float32")
    assert view.storage is weight.storage and (view.start, view.strides) == (2, (3, 1))
    assert found.tensors == [weight, view] and list(found.storages) == ["0"]


def test_calls_and_their_hosts_are_kept_apart() -> None:
    body = call(call(g("builtins.getattr"), g("a.Outer"), u("Inner")), i(3))
    made = root_of(pkl(body))
    assert made.path == "?" and made.args == (3,)
    assert made.fn.path == "builtins.getattr" and made.fn.args[1] == "Inner"
    assert isinstance(made.fn.args[0], Global)


def test_records_take_states_items_and_pairs() -> None:
    body = g("a.B") + t(i(1)) + b"\x81" + d((u("x"), i(1))) + b"b" + i(5) + b"a" + u("k") + i(6) + b"s"
    made = root_of(pkl(body))
    assert isinstance(made, Obj) and (made.kind, made.args) == ("new", (1,))
    assert made.state == {"x": 1} and made.items == [5] and made.pairs == [("k", 6)]
    assert repr(made) == "<new a.B>"


def test_names_of_python_2_only_in_old_protocols() -> None:
    assert root_of(pkl(g("__builtin__.unicode"), 2)).path == "builtins.str"
    assert root_of(pkl(g("__builtin__.unicode"), 3)).path == "__builtin__.unicode"


def test_pickles_in_a_row_and_places_in_messages() -> None:
    data = pkl(i(1)) + pkl(i(2)) + pkl(b"\xff")
    first = describe(data, file="x")
    second = describe(data, file="x", start=first.end)
    assert (first.root, second.root) == (1, 2)
    with pytest.raises(FileError, match="byte 1018: unknown pickle opcode 0xff") as caught:
        describe(data, file="x", member="data.pkl", base=1000, start=second.end)
    assert str(caught.value).startswith("x!data.pkl @ byte")


def test_what_more_data_could_mend_is_told_apart() -> None:
    data = pickle.dumps(PLAIN)
    for cut in range(len(data)):
        with pytest.raises(Truncated):
            describe(data[:cut], file="x")
    with pytest.raises(FileError) as caught:
        describe(pkl(b"00" + b"N" * 40), file="x")
    assert not isinstance(caught.value, Truncated)


def test_limits() -> None:
    data = pickle.dumps(list(range(1000)))
    with pytest.raises(FileError, match="over the limit of 100"):
        describe(data, file="x", limits=Limits(pickle_bytes=100))
    with pytest.raises(FileError, match="describes objects of more than 0 MiB"):
        describe(b"\x80\x02" + b"}" * 2000 + b".", file="x", limits=Limits(budget=0, ratio=1))


def test_persistent_ids_only_where_there_are_storages() -> None:
    with pytest.raises(FileError, match="persistent id in a pickle that has no storages"):
        describe(pkl(storage("0", 8)), file="x", storages=False)


def test_a_failure_keeps_no_objects_alive() -> None:
    with pytest.raises(FileError) as caught:
        describe(b"\x80\x02" + b"}" * 1000, file="x")
    assert caught.value.__context__ is None


@pytest.mark.slow
def test_flatten() -> None:
    tree = {"a": [1, {"b": (2, 3)}], 5: "x", None: {}}
    assert list(flatten(tree)) == [("a.0", 1), ("a.1.b.0", 2), ("a.1.b.1", 3), ("5", "x")]
    shared = [1] * 1000
    assert sum(1 for _ in flatten([shared] * 100)) == 100_000
    assert sum(1 for _ in flatten([[0] * 500_000])) == 500_000


def test_reading_imports_nothing_heavy_and_nothing_named(tmp_path: Any) -> None:
    """No torch, no numpy, and above all not the module that the pickle names."""
    path = tmp_path / "x.pkl"
    path.write_bytes(pkl(d((u("a"), call(g("antigravity.fly"))), (u("b"), call(g("numpy.dtype"), u("f4"))))))
    program = (
        "import sys; from surgery.containers.pickles.describe import describe\n"
        f"describe(open({str(path)!r}, 'rb').read(), file='x')\n"
        "assert not {'torch', 'numpy', 'antigravity', 'pickle'} & set(sys.modules), sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_library_writer_is_read_whole() -> None:
    """Every opcode that pickletools knows and pickle can write is in the table, or refused in words."""
    from surgery.containers.pickles.table import TABLE, _unknown

    missing = [op.name for op in pickletools.opcodes if TABLE[ord(op.code)] is _unknown]
    assert missing == []
