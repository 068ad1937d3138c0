"""Pickles that would run a program if a pickle library loaded them, beside good weights.

The weights must be read exactly, the payload's names be listed, and the marker file not appear.
`PAYLOADS[name](marker)` are opcodes for one value; test_attacks.py proves on a sample that they are live.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from attacks.build import (
    NONE,
    WEIGHT,
    Case,
    b,
    call,
    d,
    file_case,
    g,
    g4,
    i,
    l,
    legacy,
    pkl,
    raw_zip,
    storage,
    t,
    tensor,
    torch_zip,
    u,
    weights,
)

Payload = Callable[[Path], bytes]


def touch(marker: Path) -> str:
    return f"touch {marker}"


def python(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()"


def attribute(value: bytes, name: str) -> bytes:
    return call(g("builtins.getattr"), value, u(name))


def module(name: str) -> bytes:
    return call(g("builtins.__import__"), u(name))


PAYLOADS: dict[str, Payload] = {
    # a shell
    "os.system": lambda m: call(g("os.system"), u(touch(m))),
    "posix.system": lambda m: call(g("posix.system"), u(touch(m))),
    "os.popen": lambda m: attribute(call(g("os.popen"), u(touch(m))), "read") + t() + b"R",
    "subprocess.call": lambda m: call(g("subprocess.call"), l(u("touch"), u(str(m)))),
    "subprocess.getoutput": lambda m: call(g("subprocess.getoutput"), u(touch(m))),
    "subprocess.Popen": lambda m: attribute(call(g("subprocess.Popen"), l(u("touch"), u(str(m)))), "wait") + t() + b"R",
    "os.spawnvp": lambda m: call(g("os.spawnvp"), i(0), u("touch"), l(u("touch"), u(str(m)))),
    "pty.spawn": lambda m: call(g("pty.spawn"), l(u("touch"), u(str(m)))),
    # Python source
    "builtins.eval": lambda m: call(g("builtins.eval"), u(python(m))),
    "builtins.exec": lambda m: call(g("builtins.exec"), u(python(m))),
    "__builtin__.eval": lambda m: call(g("__builtin__.eval"), u(python(m))),
    "exec_compile": lambda m: call(g("builtins.exec"), call(g("builtins.compile"), u(python(m)), u("x"), u("exec"))),
    "runpy._run_code": lambda m: call(g("runpy._run_code"), u(python(m)), d()),
    "timeit.timeit": lambda m: call(g("timeit.timeit"), u(python(m)), u("pass"), g("time.time"), i(1)),
    "cProfile.run": lambda m: call(g("cProfile.run"), u(python(m)), u("/dev/null")),
    "profile.run": lambda m: call(g("profile.run"), u(python(m)), u("/dev/null")),
    "pdb.run": lambda m: attribute(call(g("bdb.Bdb")), "run") + t(u(python(m))) + b"R",
    "code.runsource": lambda m: attribute(call(g("code.InteractiveInterpreter")), "runsource") + t(u(python(m))) + b"R",
    # names that are looked up in steps
    "import_getattr": lambda m: attribute(module("os"), "system") + t(u(touch(m))) + b"R",
    "importlib": lambda m: attribute(call(g("importlib.import_module"), u("os")), "system") + t(u(touch(m))) + b"R",
    "methodcaller": lambda m: call(g("operator.methodcaller"), u("system"), u(touch(m))) + t(module("os")) + b"R",
    "attrgetter": lambda m: (
        call(g("operator.attrgetter"), u("system")) + t(module("os")) + b"R" + t(u(touch(m))) + b"R"
    ),
    "partial": lambda m: call(g("functools.partial"), g("os.system"), u(touch(m))) + t() + b"R",
    "list_map": lambda m: call(g("builtins.list"), call(g("builtins.map"), g("os.system"), l(u(touch(m))))),
    "getattr_chain": lambda m: attribute(attribute(module("shutil"), "os"), "system") + t(u(touch(m))) + b"R",
    "dotted_name": lambda m: g4("shutil", "os.system") + t(u(touch(m))) + b"R",
    # opcodes other than REDUCE
    "inst": lambda m: b"(" + u(touch(m)) + b"ios\nsystem\n",
    "obj": lambda m: b"(" + g("os.system") + u(touch(m)) + b"o",
    "stack_global": lambda m: g4("os", "system") + t(u(touch(m))) + b"R",
    "build_setstate": lambda m: (
        g("argparse.Namespace") + b")\x81" + d((u("__setstate__"), g("os.system"))) + b"b" + u(touch(m)) + b"b"
    ),
    "newobj_slots": lambda m: (
        g("argparse.Namespace") + b")\x81" + d((u("append"), g("os.system"))) + b"b" + u(touch(m)) + b"a"
    ),
    # files are written without any shell
    "builtins.open": lambda m: call(g("builtins.open"), u(str(m)), u("w")),
    "io.FileIO": lambda m: call(g("io.FileIO"), u(str(m)), u("w")),
    "os.mkdir": lambda m: call(g("os.mkdir"), u(str(m))),
    "os.symlink": lambda m: call(g("os.symlink"), u("/"), u(str(m))),
    "pathlib_write": lambda m: attribute(call(g("pathlib.PosixPath"), u(str(m))), "write_text") + t(u("x")) + b"R",
    "shutil.copy": lambda m: call(g("shutil.copy"), u("/etc/hostname"), u(str(m))),
    "sqlite3.connect": lambda m: (
        attribute(call(g("sqlite3.connect"), u(str(m))), "execute") + t(u("create table t(x)")) + b"R"
    ),
    "logging.FileHandler": lambda m: call(g("logging.FileHandler"), u(str(m))),
    # pickles in pickles
    "pickle.loads": lambda m: call(g("pickle.loads"), b(pkl(call(g("os.system"), u(touch(m)))))),
    "_pickle.loads": lambda m: call(g("_pickle.loads"), b(pkl(call(g("os.system"), u(touch(m)))))),
    "load_from_bytes": lambda m: call(
        g("torch.storage._load_from_bytes"), b(legacy(call(g("os.system"), u(touch(m)))))
    ),
}


def _beside_weights(name: str, payload: Payload) -> Case:
    protocol = 4 if name in ("dotted_name", "stack_global") else 2
    return file_case(f"zip {name}", lambda marker: torch_zip(weights((u("x"), payload(marker))), protocol=protocol))


def _zip(name: str, body: Callable[[bytes], bytes]) -> Case:
    """os.system at an unusual place of the pickle"""
    return file_case(name, lambda marker: torch_zip(body(call(g("os.system"), u(touch(marker))))))


def _legacy(name: str, where: str, refused: str | None) -> Case:
    def data(marker: Path) -> bytes:
        return legacy(**{where: pkl(call(g("os.system"), u(touch(marker))))})

    return file_case(f"legacy {name}", data, refused)


STORAGE_OF_CALL = "points to <Obj> instead of a storage"
CASES = [
    *(_beside_weights(name, payload) for name, payload in PAYLOADS.items()),
    *(
        file_case(f"legacy {name}", lambda m, name=name: legacy(weights((u("x"), PAYLOADS[name](m)))))
        for name in ("os.system", "builtins.eval", "runpy._run_code", "import_getattr", "inst", "build_setstate")
    ),
    _legacy("payload in sys_info", "sys_info", None),
    _legacy("payload in magic", "magic", "magic number is missing"),
    _legacy("payload in protocol", "protocol", "unknown legacy protocol"),
    _legacy("payload in keys", "keys", "list of storage keys is malformed"),
    _zip("payload as key", lambda x: d((x, NONE), (u("w"), WEIGHT))),
    _zip("payload dropped from the stack", lambda x: x + b"0" + weights()),
    _zip("payload only in the memo", lambda x: x + b"q\x070" + weights()),
    _zip("payload in a set", lambda x: weights((u("x"), call(g("builtins.set"), l(x))))),
    _zip("payload as attribute of the weights", lambda x: weights() + b"0" + weights((u("x"), x))),
    _zip("payload in OrderedDict", lambda x: weights((u("x"), call(g("collections.OrderedDict"), l(l(u("k"), x)))))),
    _zip("payload as factory", lambda x: weights((u("x"), call(g("collections.defaultdict"), x)))),
    file_case(
        "payload as storage",
        lambda m: torch_zip(d((u("w"), tensor(call(g("os.system"), u(touch(m))), 0, (8,), (1,))))),
        STORAGE_OF_CALL,
    ),
    file_case(
        "payload as shape",
        lambda m: torch_zip(
            d(
                (
                    u("w"),
                    call(
                        g("torch._utils._rebuild_tensor_v2"),
                        storage("0", 8),
                        i(0),
                        call(g("os.system"), u(touch(m))),
                        t(i(1)),
                        NONE,
                        NONE,
                    ),
                )
            )
        ),
        "tensor shape is <Obj>, not a tuple",
    ),
    file_case(
        "payload in the storage's key",
        lambda m: torch_zip(
            d(
                (
                    u("w"),
                    tensor(
                        t(u("storage"), g("torch.FloatStorage"), call(g("os.system"), u(touch(m))), u("cpu"), i(8))
                        + b"Q",
                        0,
                        (8,),
                        (1,),
                    ),
                )
            )
        ),
        "bad storage key <Obj>",
    ),
    file_case(
        "payload as persistent id",
        lambda m: torch_zip(call(g("os.system"), u(touch(m))) + b"Q"),
        "unknown persistent id",
    ),
    file_case("payload is all there is", lambda m: torch_zip(PAYLOADS["os.system"](m)), values={}),
    file_case(
        "payload before the pickle, in a plain stream",
        lambda m: raw_zip(pkl(PAYLOADS["os.system"](m)) + pkl(weights())),
        "unexplained bytes after the pickle",
    ),
    file_case("bare pickle payload", lambda m: pkl(PAYLOADS["os.system"](m)), "magic number is missing"),
    file_case(
        "bare protocol 0 payload",
        lambda m: b"cos\nsystem\n(S'" + touch(m).encode() + b"'\ntR.",
        "no checkpoint that surgery knows",
    ),
    file_case(
        "weight replaced by a payload that returns one",
        lambda m: torch_zip(
            d((u("w"), call(g("torch._utils._rebuild_device_tensor_from_numpy"), PAYLOADS["os.system"](m))))
        ),
        "no plain tensor",
    ),
]
