"""Tensor records that point outside their storage, lie about sizes, or are no plain tensors."""

# ruff: noqa: E501  (tables of cases, one a line)
from __future__ import annotations

import struct

from attacks.build import (
    FALSE,
    FLOATS,
    NONE,
    TRUE,
    VALUES,
    WEIGHT,
    Case,
    Member,
    b,
    call,
    d,
    f,
    file_case,
    g,
    i,
    ints,
    l,
    legacy,
    raw_tensor,
    storage,
    t,
    tensor,
    torch_members,
    torch_zip,
    u,
    weights,
    zip_archive,
)

S = storage("0", 8)
HUGE = 1 << 62


def one(name: str, value: bytes, refused: str | None, stores: dict[str, bytes] | None = None, **more: object) -> Case:
    """{"w": value}"""
    return file_case(f"tensor {name}", torch_zip(d((u("w"), value)), stores), refused, **more)


def persistent(*pid: bytes) -> bytes:
    return tensor(t(*pid) + b"Q", 0, (8,), (1,))


def v3(dtype: bytes, cls: str, numel: int, count: int) -> bytes:
    hooks = call(g("collections.OrderedDict"))
    return call(g("torch._utils._rebuild_tensor_v3"), storage("0", numel, cls), i(0), ints((count,)), ints((1,)), FALSE,
                hooks, dtype)  # fmt: skip


def rebuilt(function: str, *args: bytes) -> bytes:
    return call(g(f"torch._utils.{function}"), *args)


def big_endian(members: list[Member]) -> bytes:
    return zip_archive([*members, Member("a/byteorder", b"big")])


BOUNDS = [
    one("one element too many", tensor(S, 0, (9,), (1,)), "needs 36 bytes but storage '0' has 32"),
    one("offset too far", tensor(S, 1, (8,), (1,)), "needs 36 bytes"),
    one("stride too wide", tensor(S, 0, (4,), (3,)), "needs 40 bytes"),
    one("rows past the end", tensor(S, 0, (100, 4), (4, 1)), "needs 1600 bytes"),
    one("offset negative", raw_tensor(S, i(-1), ints((1,)), ints((1,))), "storage offset of a tensor is -1"),
    one("stride negative", tensor(S, 7, (8,), (-1,)), "tensor strides is -1"),
    one("size negative", tensor(S, 0, (-8,), (1,)), "tensor shape is -8"),
    one("offset of 2^63", tensor(S, 1 << 63, (1,), (1,)), "not an integer in"),
    one("offset of 2^62", tensor(S, HUGE, (1,), (1,)), "but storage '0' has 32"),
    one("product of sizes wraps to 0", tensor(S, 0, (1 << 32, 1 << 32), (1, 1)), "bytes but storage"),
    one("product of strides wraps", tensor(S, 0, (1 << 62, 5), (1 << 62, 1)), "bytes but storage"),
    one("sizes of 64 dimensions wrap", tensor(S, 0, (HUGE,) * 64, (HUGE,) * 64), "bytes but storage"),
    one("65 dimensions", tensor(S, 0, (1,) * 65, (1,) * 65), "65 dimensions, more than 64"),
    one("a million dimensions", tensor(S, 0, (1,) * 1_000_000, (1,)), "1000000 dimensions", bomb=True),
    one("offset is True", raw_tensor(S, TRUE, ints((1,)), ints((1,))), "storage offset of a tensor is True"),
    one("offset is a float", raw_tensor(S, f(0.0), ints((1,)), ints((1,))), "tensor is 0.0"),
    one("size is a float", raw_tensor(S, i(0), t(f(8.0)), ints((1,))), "tensor shape is 8.0"),
    one("shape is a text", raw_tensor(S, i(0), u("8"), ints((1,))), "tensor shape is '8'"),
    one("shape is a dict", raw_tensor(S, i(0), b"}", ints((1,))), "tensor shape is <dict>"),
    one("more sizes than strides", tensor(S, 0, (2, 4), (1,)), "2 dimensions but 1 strides"),
    one("too few arguments", call(g("torch._utils._rebuild_tensor_v2"), S, i(0)), "2 arguments, expected at least 6"),
    one("without a storage", tensor(i(0), 0, (1,), (1,)), "points to 0 instead of a storage"),
    one("empty but enormous", tensor(S, 0, (0, HUGE), (HUGE, 1)), None, values={"w": []}),
    one("expanded to 16 GiB", tensor(S, 0, (1 << 32,), (0,)), "grows 4 stored bytes to 17179869184", bomb=False),
    one("windows of 32 GiB", tensor(S, 0, (1 << 31, 4), (0, 1)), "grows 16 stored bytes"),
    one("expanded a little", tensor(S, 3, (4,), (0,)), None, values={"w": [3.0] * 4}),
    one(
        "overlapping windows", tensor(S, 0, (3, 4), (2, 1)), None, values={"w": [VALUES[k : k + 4] for k in (0, 2, 4)]}
    ),
    one("transposed", tensor(S, 0, (4, 2), (1, 4)), None, values={"w": [[float(r), r + 4.0] for r in range(4)]}),
    one("every second", tensor(S, 1, (4,), (2,)), None, values={"w": [1.0, 3.0, 5.0, 7.0]}),
]

STORAGES = [
    one("storage missing", tensor(storage("1", 8), 0, (8,), (1,)), "no member 'a/data/1'"),
    one("storage declared longer", tensor(storage("0", 16), 0, (16,), (1,)), "64 bytes, but its member has 32"),
    one("storage declared shorter", tensor(storage("0", 4), 0, (4,), (1,)), "16 bytes, but its member has 32"),
    one("storage of 2^62 elements", tensor(storage("0", HUGE), 0, (8,), (1,)), "but its member has 32"),
    one("storage of -1 elements", tensor(storage("0", -1), 0, (0,), (1,)), "element count of storage '0' is -1"),
    one("storage count is a float", persistent(u("storage"), g("torch.FloatStorage"), u("0"), u("cpu"), f(8.0)), "is 8.0"),
    one(
        "storage with two dtypes",
        l(WEIGHT, tensor(storage("0", 4, "torch.DoubleStorage"), 0, (4,), (1,))),
        "declared as <storage '0' DoubleStorage.4.> and before as",
    ),
    one("storage with two sizes", l(WEIGHT, tensor(storage("0", 7), 0, (4,), (1,))), "and before as"),
    one("storage of a foreign module", tensor(storage("0", 8, "posix.FloatStorage"), 0, (8,), (1,)), "unknown storage type"),
    one("storage of unknown class", tensor(storage("0", 8, "torch.QInt8Storage"), 0, (8,), (1,)), "unknown storage type"),
    one("storage class is a text", persistent(u("storage"), u("FloatStorage"), u("0"), u("cpu"), i(8)), "unknown storage"),
    one("storage key is a path", tensor(storage("../../etc/passwd", 8), 0, (8,), (1,)), "there is no member"),
    one("storage key is empty", tensor(storage("", 8), 0, (8,), (1,)), "bad storage key"),
    one("storage key of 1 MB", tensor(storage("k" * (1 << 20), 8), 0, (8,), (1,)), "bad storage key"),
    one("persistent id too short", persistent(u("storage"), u("0")), "unknown persistent id"),
    one("persistent id unknown", persistent(u("url"), u("a"), u("b"), u("c"), u("d")), "unknown persistent id 'url'"),
    one("persistent id is a number", tensor(i(3) + b"Q", 0, (8,), (1,)), "unknown persistent id 3"),
    one("storage itself", S, "no plain tensor but 'torch.Storage'"),
    file_case(
        "tensor legacy view outside",
        legacy(d((u("w"), tensor(t(u("storage"), g("torch.FloatStorage"), u("0"), u("cpu"), i(8),
               t(u("v"), i(6), i(4))) + b"Q", 0, (4,), (1,))))),
        "storage view of 4 elements from 6",
    ),
    file_case(
        "tensor legacy view inside",
        legacy(d((u("w"), tensor(t(u("storage"), g("torch.FloatStorage"), u("0"), u("cpu"), i(8),
               t(u("v"), i(2), i(4))) + b"Q", 1, (3,), (1,))))),
        values={"w": VALUES[3:6]},
    ),
]  # fmt: skip

KINDS = [
    one("dtype unknown", v3(g("torch.qint8"), "torch.UntypedStorage", 32, 8), "unknown dtype 'torch.qint8'"),
    one("dtype is a function", v3(g("torch.load"), "torch.UntypedStorage", 32, 8), "unknown dtype 'torch.load'"),
    one("dtype elsewhere", v3(g("os.float32"), "torch.UntypedStorage", 32, 8), "unknown dtype 'os.float32'"),
    one("dtype is a text", v3(u("float32"), "torch.UntypedStorage", 32, 8), "unknown dtype 'float32'"),
    one("untyped too short", v3(g("torch.float64"), "torch.UntypedStorage", 32, 8), "needs 64 bytes but storage"),
    one("untyped", v3(g("torch.float32"), "torch.UntypedStorage", 32, 8), None),
    one("metadata unknown", raw_tensor(S, i(0), ints((8,)), ints((1,)), d((u("x"), TRUE))), "unknown tensor metadata"),
    one("metadata no dict", raw_tensor(S, i(0), ints((8,)), ints((1,)), u("conj")), "unknown tensor metadata"),
    one("conjugated", raw_tensor(S, i(0), ints((8,)), ints((1,)), d((u("conj"), TRUE))), "no plain tensor"),
    one("negated", raw_tensor(S, i(0), ints((8,)), ints((1,)), d((u("neg"), TRUE))), "no plain tensor"),
    one("not conjugated", raw_tensor(S, i(0), ints((8,)), ints((1,)), d((u("conj"), FALSE))), None),
    one("sparse", rebuilt("_rebuild_sparse_tensor", g("torch.sparse_coo"), t(WEIGHT, WEIGHT, ints((8,)))), "no plain"),
    one("quantised", rebuilt("_rebuild_qtensor", S, i(0), ints((8,)), ints((1,)), NONE, FALSE, NONE), "no plain"),
    one("meta", rebuilt("_rebuild_meta_tensor_no_storage", g("torch.float32"), ints((8,)), ints((1,)), FALSE), "no plain"),
    one("wrapper", rebuilt("_rebuild_wrapper_subclass", g("x.DTensor"), WEIGHT), "no plain tensor"),
    one("nested", rebuilt("_rebuild_nested_tensor", WEIGHT, WEIGHT, WEIGHT, WEIGHT), "no plain tensor"),
    one("inside a foreign object", call(g("x.DTensor"), WEIGHT), "no plain tensor but 'x.DTensor'"),
    one("in the state of an object", g("x.Shard") + b")\x81" + d((u("tensor"), WEIGHT)) + b"b", "no plain tensor"),
    one("parameter of nothing", rebuilt("_rebuild_parameter", NONE, TRUE, NONE), "no plain tensor"),
    one("parameter", rebuilt("_rebuild_parameter", WEIGHT, TRUE, NONE), None),
    one("from type, malformed", call(g("torch._tensor._rebuild_from_type_v2"), WEIGHT), "is malformed"),
    one(
        "from type, foreign function",
        call(g("torch._tensor._rebuild_from_type_v2"), g("os.system"), g("x.T"), t(u("true")), NONE),
        "no plain tensor",
    ),
    one(
        "from type, out of bounds",
        call(g("torch._tensor._rebuild_from_type_v2"), g("torch._utils._rebuild_tensor_v2"), g("x.T"),
             t(S, i(9), ints((8,)), ints((1,)), FALSE, NONE), NONE),
        "needs 68 bytes",
    ),
    one("state is a list", WEIGHT + b"]b", "state of a TensorRecord is <list>"),
    file_case("tensor big-endian", big_endian(torch_members(weights(), {"0": struct.pack(">8f", *VALUES)}))),
    file_case(
        "tensor byte order unknown",
        zip_archive([*torch_members(weights()), Member("a/byteorder", b"middle")]),
        "unknown byte order b'middle'",
    ),
    one("item of bool storage", tensor(storage("0", 32, "torch.BoolStorage"), 0, (32,), (1,)), None, {"0": b"\1" * 32},
        values={"w": [True] * 32}),
    one("bytes given for a weight", b(FLOATS), None, values={}),
]  # fmt: skip

CASES: list[Case] = [*BOUNDS, *STORAGES, *KINDS]
