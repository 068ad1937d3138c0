"""Every hostile or broken file of tests/attacks ends in a clear SurgeryError, or is read as exactly what it holds."""

from __future__ import annotations

import itertools
import pickle
import pickletools
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attacks import archives, folders, machine, payloads, tables, tensors
from attacks.build import Case, pkl
from surgery.errors import SurgeryError

CASES = [*payloads.CASES, *machine.CASES, *tensors.CASES, *archives.CASES, *tables.CASES, *folders.CASES]
SECONDS = 5.0  # of processor time; the slowest takes about one
MEMORY = 1200 << 20  # bytes of address space, interpreter included


def check_message(error: SurgeryError, folder: Path) -> None:
    """The house's form: says where and what, in printable ASCII, briefly."""
    text = str(error)
    assert all(32 <= ord(c) < 127 or c == "\n" for c in text), ascii(text)
    assert len(text) < 1200, len(text)
    assert error.file is not None and str(folder) in error.file, text
    assert error.what


@pytest.mark.parametrize("case", [case for case in CASES if not case.bomb], ids=lambda case: case.name)
def test_attack(case: Case, tmp_path: Path) -> None:
    run(case, tmp_path)


def run(case: Case, tmp_path: Path) -> None:
    """Make the files, read them, and check what comes of it."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    path = case.make(folder)
    start = time.process_time()
    if case.refused is None:
        values, names = case.read(path)
        assert values == case.values
        assert set(case.globals) <= set(names)
    else:
        with pytest.raises(SurgeryError) as caught:
            case.read(path)
        check_message(caught.value, tmp_path)
        assert re.search(case.refused, str(caught.value)), str(caught.value)
    assert time.process_time() - start < SECONDS
    assert not (folder / "marker").exists()


def test_case_names_are_unique() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) and len(names) > 300


@pytest.mark.parametrize("name", payloads.PAYLOADS)
def test_names_of_a_payload_are_listed(name: str, tmp_path: Path) -> None:
    """The standard library's disassembler is the oracle for which names a pickle mentions."""
    from surgery.containers.pickles.describe import describe

    data = pkl(payloads.PAYLOADS[name](tmp_path / "marker"), 4 if "stack" in name or "dotted" in name else 3)
    mentioned = {arg.replace(" ", ".") for op, arg, _ in pickletools.genops(data) if op.name in ("GLOBAL", "INST")}
    found = describe(data, file="x")
    assert mentioned <= set(found.globals)
    assert found.globals and not (tmp_path / "marker").exists()


@pytest.mark.slow
def test_payloads_are_live(tmp_path: Path) -> None:
    """A pickle library that loads them does run them: else refusing them would prove nothing."""
    files = []
    for number, (name, payload) in enumerate(payloads.PAYLOADS.items()):
        marker, path = tmp_path / f"marker{number}", tmp_path / f"{number}.pkl"
        path.write_bytes(pkl(payload(marker), 4 if name in ("stack_global", "dotted_name") else 2))
        files.append((name, path, marker))
    program = (
        "import pickle, sys\n"
        "for path in sys.argv[1:]:\n"
        "    try: pickle.load(open(path, 'rb'))\n"
        "    except BaseException as error: print(path, repr(error))\n"
    )
    args = [sys.executable, "-c", program, *(str(path) for _, path, _ in files)]
    done = subprocess.run(args, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    dead = [name for name, _, marker in files if not (marker.exists() or marker.is_symlink())]
    assert not dead, (dead, done.stdout, done.stderr)


BOMB_RUNNER = """
import gc, resource, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from test_attacks import CASES, run
import torch  # its libraries take 0.5 GB of addresses
resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))
for number, case in enumerate(CASES):
    if case.bomb:
        print(case.name, flush=True)
        (Path({folder!r}) / str(number)).mkdir()
        run(case, Path({folder!r}) / str(number))
        gc.collect()
print("survived")
"""


@pytest.mark.slow
def test_bombs_within_little_memory(tmp_path: Path) -> None:
    """What aims at memory or time, in a process that may not have more: no MemoryError, no crash, no waiting."""
    here = Path(__file__).parent
    program = BOMB_RUNNER.format(paths=[str(here), str(here.parent)], limit=MEMORY, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("survived\n"), (done.stdout[-100:], done.stderr[-3000:])


def test_pickles_of_the_standard_library_are_described() -> None:
    """Plain data come out as pickle.loads gives them, in every protocol (sets as lists)."""
    data = {
        "a": [1, -7, 1 << 70, 2.5, "x\u20ac\n'", b"\0\xff", (None, True, ()), {}],
        3: [[]],
        None: "n",
        (1, "t"): 0.0,
    }
    for protocol, twice in itertools.product(range(6), (False, True)):
        from surgery.containers.pickles.describe import describe

        value = [data, data] if twice else data
        assert describe(pickle.dumps(value, protocol), file="x").root == value
