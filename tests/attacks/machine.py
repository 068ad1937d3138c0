"""Pickles that break the rules of the pickle machine, or would make it slow or large."""

from __future__ import annotations

import pickle
import struct

from attacks.build import (
    FALSE,
    NONE,
    Case,
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
    pkl,
    raw_zip,
    t,
    torch_members,
    torch_zip,
    u,
    weights,
    zip_archive,
)

M61 = (1 << 61) - 1
FLOOD = 3 << 19


def bad(name: str, body: bytes, refused: str | None, protocol: int = 2, bomb: bool = False, **more: object) -> Case:
    """{"w": good weights, "x": body}"""
    data = torch_zip(weights((u("x"), body)), protocol=protocol)
    return file_case(f"pickle {name}", data, refused, bomb=bomb, **more)


def raw(name: str, pickled: bytes, refused: str, **more: object) -> Case:
    return file_case(f"pickle {name}", raw_zip(pickled), refused, **more)


def q(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def colliding_tuples(count: int) -> bytes:
    """Pairs of integers that all have one hash: CPython's tuple hash has no secret and can be inverted."""
    mask, p1, p2, p5 = (1 << 64) - 1, 11400714785074694791, 14029467366897019727, 2870177450012600261
    inverse, out, first = pow(p2, -1, 1 << 64), [], 1

    def turn(x: int) -> int:
        return (x << 31 | x >> 33) & mask

    while len(out) < count:
        second = (12345 - turn((p5 + first * p2) & mask) * p1) * inverse & mask
        if second < 1 << 60:
            out.append(t(i(first), i(second)) + NONE)
        first += 1
    return b"}(" + b"".join(out) + b"u"


def nested_tuple(depth: int) -> bytes:
    return i(1) + b"\x85" * depth


def shared_tuples(levels: int) -> bytes:
    """(x, x) of (x, x) of ...: 2^levels leaves, and hashing visits them all"""
    return i(1) + b"2\x86" * levels


def shared_lists(levels: int) -> bytes:
    return l(i(1)) + b"".join(b"q\x010](h\x01h\x01e" for _ in range(levels))


STRUCTURE = [
    raw("empty", b"", "ends without STOP"),
    raw("only a protocol", b"\x80\x02", "ends without STOP"),
    raw("without STOP", pkl(weights())[:-1], "ends without STOP"),
    raw("cut in a text", pkl(weights())[:40], "goes past the end|ends inside|ends without"),
    raw("STOP at once", b"\x80\x02.", "leftovers"),
    raw("two values at STOP", pkl(NONE + NONE), "leftovers"),
    raw("open mark at STOP", pkl(b"(" + NONE), "leftovers"),
    raw("bytes after STOP", pkl(weights()) + b"garbage", "7 unexplained bytes"),
    raw("protocol 6", b"\x80\x06N.", "protocol 6 is newer"),
    raw("protocol 255", b"\x80\xffN.", "protocol 255 is newer"),
    raw("unknown opcode", pkl(b"\xff"), "unknown pickle opcode 0xff"),
    raw("text instead", b"hello world, this is no pickle", "unknown pickle opcode 0x68|memo"),
    raw("frame too long", b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"N.", "frame of 1099511627776 bytes"),
    bad("stack underflow", b"000000000000" + b"\x86" + NONE * 30, "takes more from the stack|mark"),
    bad("mark underflow", b"0" * 9 + b"t" + NONE * 30, "needs a mark|takes more"),
    bad("TUPLE without mark", pkl(NONE), "leftovers"),
    raw("APPENDS without mark", pkl(b"]e" + b"N" * 30), "needs a mark"),
    raw("TUPLE3 of two", pkl(b"NN\x87" + b"N" * 30), "takes more from the stack"),
    raw("DUP of nothing", pkl(b"2" + b"N" * 30), "takes more from the stack"),
    raw("POP of nothing", pkl(b"0" + b"N" * 30), "needs a mark"),
    raw("OBJ without class", pkl(b"(o" + b"N" * 30), "takes more from the stack"),
    raw("PUT of nothing", pkl(b"q\x01" + b"N" * 30), "takes more from the stack"),
    bad("memo never written", b"h\x77", "memo 119 is read but was never written"),
    bad("long memo never written", b"j\xff\xff\xff\x7f", "memo 2147483647 is read"),
    bad("text memo never written", b"g77\n", "memo 77 is read"),
    bad("memo index negative", NONE + b"p-1\n", "memo index -1 is out of range"),
    bad("memo index no number", NONE + b"pabc\n", "'abc' is not an integer"),
    bad("memo index with underscore", NONE + b"p1_0\n", "is not an integer"),
    bad("memo index huge", NONE + b"r\xff\xff\xff\x0f" + b"0" + NONE, None, bomb=True),
    bad("extension code", b"\x82\x01", "copyreg extension code"),
    bad("extension code 4", b"\x84\x01\0\0\0", "copyreg extension code"),
    bad("text persistent id", b"Pabc\n", "persistent id as text"),
    bad("out-of-band buffer", b"\x97", "out-of-band buffer", protocol=5),
    bad("read-only buffer", NONE + b"\x98", "out-of-band buffer", protocol=5),
]

VALUES = [
    bad(
        "bytes longer than the file", b"B\xff\xff\xff\x7fabc", "bytes of 2147483647 bytes goes past the end", bomb=True
    ),
    bad("bytes8 of an exabyte", b"\x8e" + struct.pack("<Q", 1 << 60), "goes past the end", bomb=True),
    bad("bytearray8 of an exabyte", b"\x96" + struct.pack("<Q", 1 << 60), "goes past the end", protocol=5, bomb=True),
    bad("unicode8 of an exabyte", b"\x8d" + struct.pack("<Q", (1 << 64) - 1), "goes past the end", bomb=True),
    bad("text longer than the file", b"X\xff\xff\xff\xff", "goes past the end"),
    bad("text not UTF-8", b"X\x02\0\0\0\xff\xfe", "not UTF-8"),
    bad("long text not UTF-8", b"\x8d" + q(b"\x80\x80"), "not UTF-8"),
    bad("global not UTF-8", b"c\xff\nx\n", "not UTF-8"),
    bad("integer of 1 MB", b"\x8b" + struct.pack("<i", 1 << 20) + b"\x01" * (1 << 20), "integer of 1048576 bytes"),
    bad("integer of 255 bytes", b"\x8a\xff" + b"\x01" * 255, "integer of 255 bytes"),
    bad("integer of negative size", b"\x8b\xff\xff\xff\xff", "integer of -1 bytes"),
    bad("text integer of 5,000 digits", b"I" + b"9" * 5000 + b"\n", "longer than 1024"),
    bad("text integer of 900 digits", b"L" + b"9" * 900 + b"L\n", "not an integer"),
    bad("text integer is code", b"I__import__('os')\n", "not an integer"),
    bad("text float is no number", b"Fpi\n", "'pi' is not a number"),
    bad("text without newline", b"F" + b"1" * 3000, "longer than 1024"),
    bad("STRING unquoted", b"Sabc\n", "not quoted"),
    bad("STRING with one quote", b"S'\n", "not quoted"),
    bad("STRING with broken escape", b"S'\\x'\n", "broken escape"),
    bad("UNICODE with broken escape", b"V\\u12\n", "not UTF-8"),
    bad("name of 1 MB", u("x" * (1 << 20)) + u("y") + b"\x93", "longer than 1024 characters", protocol=4),
    bad("name as line of 1 MB", b"c" + b"(" * (1 << 20) + b"\nx\n", "longer than 1024"),
    bad("name is no text", i(1) + u("y") + b"\x93", "name of a global is not text", protocol=4),
    bad("bytes record above 255", call(g("_codecs.encode"), u("\u0100"), u("latin1")), "above 255"),
    bad("codec of choice", call(g("_codecs.encode"), u("abc"), u("rot13")), None),
    bad("numpy dtype of a code", call(g("numpy.dtype"), u("O8"), FALSE, FALSE), None),
    bad(
        "numpy array too short",
        call(g("numpy._core.multiarray._reconstruct"), NONE, NONE, NONE)
        + t(i(1), t(i(1 << 40)), call(g("numpy.dtype"), u("f4")), FALSE, b(b"abcd"))
        + b"b",
        "needs 4398046511104 bytes, has 4",
    ),
    bad(
        "numpy buffer too short",
        call(g("numpy.core.numeric._frombuffer"), b(b"abcd"), call(g("numpy.dtype"), u("i8")), t(i(1)), u("C")),
        "needs 8 bytes, has 4",
    ),
    bad(
        "numpy array with odd state", call(g("numpy.core.multiarray._reconstruct"), NONE) + t(i(1)) + b"b", "malformed"
    ),
    bad("torch.Size of floats", call(g("torch.Size"), t(f(1.0))), "torch.Size is 1.0, not an integer"),
]

OBJECTS = [
    bad("items set on a number", i(1) + u("k") + NONE + b"s", "items are set on 1"),
    bad("items set on a list", b"]" + u("k") + NONE + b"s", "items are set on <list>"),
    bad("items appended to a dict", b"}" + NONE + b"a", "items are appended to <dict>"),
    bad("state set on a number", i(1) + b"}b", "state is set on 1"),
    bad("state set on a dict", b"}}b", "state is set on <dict>"),
    bad("state of an OrderedDict is a list", call(g("collections.OrderedDict")) + b"]b", "not a dictionary"),
    bad("call with a list", g("os.system") + b"]R", "arguments of a call are <list>"),
    bad("call of a text", u("os.system") + b")R", "a call of 'os.system', which is not callable"),
    bad("instance of a number", i(1) + b")\x81", "instance of 1, which is not a class"),
    bad("instance with list arguments", g("a.B") + b"]\x81", "arguments of a new object"),
    bad("instance with list keywords", g("a.B") + b")]\x92", "keyword arguments", protocol=4),
    bad("odd number of items", b"}(" + u("k") + b"u", "odd number of items"),
    bad("key twice", d((u("k"), NONE), (u("k"), NONE)), "key 'k' appears twice"),
    file_case("pickle weight twice", torch_zip(weights((u("w"), NONE))), "key 'w' appears twice"),
    bad("key twice in steps", d((u("k"), NONE)) + u("k") + NONE + b"s", "key 'k' appears twice"),
    bad("key twice as 1 and True", d((i(1), NONE), (b"\x88", NONE)), "appears twice"),
    bad("key twice in DICT", b"(" + u("k") + NONE + u("k") + NONE + b"d", "appears twice"),
    bad("OrderedDict item twice", call(g("collections.OrderedDict"), l(l(u("k"), NONE), l(u("k"), NONE))), "twice"),
    bad("OrderedDict item no pair", call(g("collections.OrderedDict"), l(l(u("k")))), "not a pair"),
    bad("key is a float", d((f(1.5), NONE)), "dictionary key is 1.5"),
    bad("key is a list", d((b"]", NONE)), "dictionary key is <list>"),
    bad("key is a dict", d((b"}", NONE)), "dictionary key is <dict>"),
    bad("key is a set", d((b"\x8f", NONE)), "dictionary key is <Set>", protocol=4),
    bad("key holds a list", d((t(b"]"), NONE)), "dictionary key is <list>"),
    file_case(
        "pickle key with control characters",
        torch_zip(d((u("\x1b[31m\n\u202e"), NONE), (u("\x1b[31m\n\u202e"), NONE))),
        "appears twice",
    ),
    file_case("pickle two paths alike", torch_zip(d((u("a.w"), NONE), (u("a"), d((u("w"), NONE))))), "path 'a.w'"),
    file_case("pickle is a number", torch_zip(i(7)), values={}),
    file_case("pickle name with surrogates", torch_zip(weights((u("\ud800"), NONE)))),
]

BOMBS = [
    bad("deep tuple as key", d((nested_tuple(200_000), NONE)), "tuple nested too deeply", bomb=True),
    bad("shared tuple as key", d((shared_tuples(60), NONE)), "tuple nested too deeply", bomb=True),
    bad("wide tuple as key", d((ints(tuple(range(1000))), NONE)), "too long"),
    bad("integer keys with one hash", d(*((i(k * M61), NONE) for k in range(1, 30_000))), "is too large", bomb=True),
    bad("tuple keys with one hash", colliding_tuples(20_000), "one of too many", bomb=True),
    bad(
        "memo indices with one hash",
        NONE + b"".join(b"p%d\n" % (k * M61) for k in range(1, 30_000)),
        "memo index .* out of range",
        bomb=True,
    ),
    bad("tuple of depth 500,000", nested_tuple(500_000), "nested too deeply", bomb=True),
    bad("list of depth 300,000", b"]" * 300_000 + b"a" * 299_999, "nested too deeply", bomb=True),
    bad("calls of depth 200,000", g("a.B") * 1 + b")R" * 200_000, None, bomb=True),
    bad("shared tuples of 2^60 leaves", shared_tuples(60), "repeated without end|nested too deeply", bomb=True),
    bad("shared lists of 2^50 leaves", shared_lists(50), "repeated without end", bomb=True),
    bad("list that holds itself", b"]q\x01h\x01a", "nested too deeply", bomb=True),
    bad("dict that holds itself", b"}q\x01" + u("k") + b"h\x01s", "nested too deeply", bomb=True),
    bad("long names in a shared dict", d((u("k" * 3000), d((u("k" * 3000), NONE)))), "more than 4096 characters"),
    raw("flood of dicts", b"\x80\x02" + b"}" * FLOOD, "more than .* MiB|ends without STOP", bomb=True),
    raw("flood of lists", b"\x80\x02" + b"]" * FLOOD, "more than .* MiB|ends without STOP", bomb=True),
    raw("flood of marks", b"\x80\x02" + b"(" * FLOOD, "more than .* MiB|ends without STOP", bomb=True),
    raw("flood of memo", b"\x80\x04N" + b"\x94" * FLOOD, "more than .* MiB|ends without STOP", bomb=True),
    raw("flood of sets", b"\x80\x04" + b"\x8f" * FLOOD, "more than .* MiB|ends without STOP", bomb=True),
    raw("flood of calls", b"\x80\x02" + g("a.b") + b")R2" * (FLOOD // 3), "more than|leftovers|STOP", bomb=True),
    raw(
        "flood of instances",
        b"\x80\x02" + g("a.b") + b"q\x010" + b"h\x01)\x81" * (FLOOD // 4),
        "more than|STOP",
        bomb=True,
    ),
    raw("flood of tuples", b"\x80\x02N" + b"2\x85" * (FLOOD // 2), "more than|STOP", bomb=True),
    raw("flood of None", b"\x80\x02" + b"N" * FLOOD, "ends without STOP", bomb=True),
    raw("flood of marked tuples", b"\x80\x02" + b"(t" * (FLOOD // 2), "more than|STOP", bomb=True),
    bad(
        "text doubled through bytes records",
        u("x" * 1000000) + b"q\x010" + b"](" + (g("_codecs.encode") + b"h\x01" + u("latin1") + b"\x86R") * 2000 + b"e",
        "more than .* MiB",
        bomb=True,
    ),
    bad(
        "set doubled through copies",
        l(*[NONE] * 100000) + b"q\x010" + b"](" + (g("builtins.set") + b"h\x01\x85R") * 2000 + b"e",
        "more than .* MiB",
        bomb=True,
    ),
    file_case("legacy flood of dicts", legacy(b"}" * FLOOD), "more than|leftovers", bomb=True),
]

HONEST = [
    file_case("honest legacy", legacy()),
    *(file_case(f"honest protocol byte {n}", torch_zip(weights(), protocol=n)) for n in range(6)),
    file_case(
        "honest zip with wrong CRCs",
        zip_archive([m.__class__(m.name, m.data, crc=1) for m in torch_members(weights())]),
    ),
    bad("framed", b"\x95" + struct.pack("<Q", 3) + NONE, None, protocol=4),
    *(
        bad(
            f"stdlib protocol {n}",
            pickle.dumps({"a": [1, 2.5, "x", b"y", (None, True)], 3: {4, 5}}, n).removeprefix(b"\x80" + bytes([n]))[:-1]
            if n > 1
            else b"}",
            None,
            protocol=max(n, 2),
        )
        for n in (1, 2, 3)
    ),
]

CASES: list[Case] = [*STRUCTURE, *VALUES, *OBJECTS, *BOMBS, *HONEST]
