"""What a caller or the system can get wrong ends in a SurgeryError that says what, where and what to do."""

import ast
import errno
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

import surgery
from surgery.cli import main as cli
from surgery.errors import FileError, OutputError, SurgeryError, UsageError, printable, reported, some
from surgery.writing.scratch import scratch
from surgery.writing.staging import hidden_of

ENV = os.environ | {"PYTHONPATH": str(Path(surgery.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
EVIL = "\x1b]0;owned\x07\x1b[2J\x00\u202egnp.\u200b\r"


def run(*words):
    done = CliRunner().invoke(cli.main, [str(w) for w in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


# -- arguments from Python


@pytest.mark.parametrize(
    "wrong",
    [
        {"dst": "a\0b"}, {"dst": ""}, {"dst": None}, {"dst": b"out"}, {"src": 5}, {"src": None}, {"src": "a\0b"},
        {"to": None}, {"to": ["hf"]}, {"to": "evil"}, {"from_": 1}, {"dtype": "evil"}, {"dtype": None},
        {"dtype": 16}, {"vocab_size": -1}, {"vocab_size": 0}, {"vocab_size": "9"}, {"vocab_size": 2.5},
        {"max_memory": -1}, {"max_memory": 0}, {"max_memory": "lots"}, {"max_memory": True}, {"tokenizer": 5},
        {"tokenizer": "a\0b"}, {"options": 5}, {"options": {"shard_size": 5}}, {"options": ["shard_size=5"]},
        {"options": {1: "x"}}, {"topology": 2}, {"topology": {"tp": 2}}, {"allow": "qkv_bias"}, {"allow": [1]},
        {"allow": 3}, {"progress": 1}, {"force": "no"}, {"sync": None}, {"command": "surgery convert"},
    ],
    ids=str,
)  # fmt: skip
def test_convert_refuses_what_no_flag_could_be(wrong, tiny_hf, tmp_path):
    given = {"src": tiny_hf("llama"), "dst": tmp_path / "out", "to": "hf"} | wrong
    with pytest.raises(UsageError) as caught:
        surgery.convert(**given)
    assert len(str(caught.value)) < 400
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "call",
    [
        lambda a, b: surgery.open_checkpoint(None),
        lambda a, b: surgery.open_checkpoint(a, options={"x": 1}),
        lambda a, b: surgery.open_checkpoint(a, format=[]),
        lambda a, b: surgery.open_tensors(None),
        lambda a, b: surgery.open_tensors("\0"),
        lambda a, b: surgery.verify(a, 5),
        lambda a, b: surgery.verify(a, a, max_memory=-1),
        lambda a, b: surgery.Topology(tp="2"),
        lambda a, b: surgery.upcycle(a, b, experts=4, top_k=2, max_memory=0),
        lambda a, b: surgery.upcycle(a, b, experts=4, top_k=2, dtype="evil"),
        lambda a, b: surgery.upcycle(a, "\0", experts=4, top_k=2),
        lambda a, b: surgery.collapse(a, b, by=3),
        lambda a, b: surgery.experts(a, b, options=[], top_k=1),
        lambda a, b: surgery.soup({"merge_method": "linear"}, b, threads=0),
        lambda a, b: surgery.soup({"merge_method": "linear"}, "\0"),
    ],
)
def test_so_do_the_other_functions(call, tiny_hf, tmp_path):
    with pytest.raises(SurgeryError) as caught:
        call(tiny_hf("llama"), tmp_path / "out")
    assert isinstance(caught.value, UsageError)
    assert not (tmp_path / "out").exists()


def test_every_wrong_argument_is_named_at_once():
    with pytest.raises(UsageError, match=r"src must be a path, not 5; .*max_memory must be a number of bytes"):
        surgery.convert(5, "out", to="hf", max_memory=-1)


# -- the system


FAULTS = {"fstat": [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM], "stat": [errno.EIO, errno.EACCES],
          "open": [errno.EACCES, errno.EIO], "listdir": [errno.EIO], "scandir": [errno.EACCES],
          "preadv": [errno.EIO, errno.ESTALE], "pwrite": [errno.EIO], "fsync": [errno.EIO], "rename": [errno.EIO],
          "mkdir": [errno.EROFS]}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny_hf, tmp_path_factory):
    """What `convert` writes when all goes well."""
    dst = tmp_path_factory.mktemp("whole") / "out"
    surgery.convert(tiny_hf("llama"), dst, to="meta")
    return dst


@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize(("call", "number"), [(name, n) for name, numbers in FAULTS.items() for n in numbers])
def test_a_call_of_the_system_fails(call, number, at, whole, tiny_hf, tmp_path, monkeypatch):
    """There is an error in words, or a whole output, and the next run ends well."""
    source, dst = tiny_hf("llama"), tmp_path / "out"
    real, count, here = getattr(os, call), [0], threading.get_ident()

    def fail(*args, **kw):
        mine = threading.get_ident() == here or call in ("preadv", "pwrite")
        path = args[0] if args and isinstance(args[0], (str, os.PathLike)) else None
        ours = path is None or str(path).startswith((str(tmp_path), str(source)))
        count[0] += mine and ours
        if mine and ours and count[0] == at:
            raise OSError(number, os.strerror(number), path)
        return real(*args, **kw)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with suppress(SurgeryError):
            surgery.convert(source, dst, to="meta")
    if not dst.exists():
        surgery.convert(source, dst, to="meta")
    files = {p.name: p.read_bytes() for p in dst.iterdir() if p.name != "surgery.json"}
    assert files == {p.name: p.read_bytes() for p in whole.iterdir() if p.name != "surgery.json"}


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread"),
                                   RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")])  # fmt: skip # noqa: E501
def test_no_memory_and_no_threads_are_said_in_words(error, tiny_hf, tmp_path, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(os, "preadv", fail)
    for done in (run("convert", tiny_hf("llama"), tmp_path / "out", "--to", "hf"), run("inspect", tiny_hf("llama"))):
        assert done.exit_code == 1
        assert "error: " in done.output and "--max-memory" in done.output
    monkeypatch.undo()
    monkeypatch.setattr(threading.Thread, "start", fail)
    done = run("convert", tiny_hf("llama"), tmp_path / "out", "--to", "hf")
    assert done.exit_code == 1 and "--max-memory" in done.output


def test_a_name_with_a_nul_is_no_traceback(tiny_hf):
    for words in (("inspect", "a\0b"), ("convert", tiny_hf("llama"), "a\0b", "--to", "hf"), ("soup", "\0", "x"),
                  ("verify", tiny_hf("llama"), "\0")):  # fmt: skip
        done = run(*words)
        assert done.exit_code in (1, 2) and "error: " in done.output


def test_reading_a_part_needs_memory_too(tiny_hf, monkeypatch):
    part = surgery.open_checkpoint(tiny_hf("llama")).parts["embed"]

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(os, "preadv", fail)
    for read in (part.full, lambda: part[3]):
        with pytest.raises(SurgeryError, match="not enough memory"):
            read()


def test_other_runtime_errors_are_mistakes_of_ours():
    with pytest.raises(RuntimeError, match="a mistake"), reported():
        raise RuntimeError("a mistake")
    with pytest.raises(BrokenPipeError), reported():
        raise BrokenPipeError


UNENTERABLE = """
import os, sys
from surgery.cli.main import main
import surgery.formats.registry, surgery.conversion.inspection, surgery.cli.show
if os.geteuid() == 0:
    os.setgid(65534), os.setuid(65534)
main(["inspect", sys.argv[1]])
"""


def test_a_folder_that_may_be_listed_and_not_entered(tiny_hf, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for above in (tmp_path, *tmp_path.parents):
        if above.owner() == tmp_path.owner() and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o055)
    folder.chmod(0o644)
    done = subprocess.run([sys.executable, "-c", UNENTERABLE, folder], capture_output=True, text=True, env=ENV)
    folder.chmod(0o755)
    assert done.returncode == 1
    assert "Permission denied" in done.stderr and "rights" in done.stderr and "Traceback" not in done.stderr


def test_the_working_folder_is_gone(tiny_hf, tmp_path):
    program = "import os, sys; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone'); " \
              "from surgery.cli.main import main; main(sys.argv[1:])"  # fmt: skip
    command = [sys.executable, "-c", program, "convert", tiny_hf("llama"), "out", "--to", "hf"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, cwd=tmp_path)
    assert done.returncode == 2
    assert "out: is a relative path, but the working folder has been removed" in done.stderr


# -- signals


LOGITS = """
import sys, time
import surgery.verification.logits as logits
from surgery.cli.main import main
def load(folder):
    open(sys.argv[1], "w").close()
    time.sleep(60)
logits.load = load
main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_a_signal_leaves_no_temporary_model(signum, tiny_hf, tmp_path):
    surgery.convert(tiny_hf("llama"), tmp_path / "meta", to="meta")
    (tmp_path / "tmp").mkdir()
    command = [
        sys.executable,
        "-c",
        LOGITS,
        tmp_path / "now",
        "verify",
        tmp_path / "meta",
        tiny_hf("llama"),
        "--logits",
    ]
    heard = None if signum == signal.SIGKILL else partial(signal.signal, signum, signal.SIG_DFL)  # nohup hides SIGHUP
    env = ENV | {"TMPDIR": str(tmp_path / "tmp")}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    while not (tmp_path / "now").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    assert list((tmp_path / "tmp").rglob("*.safetensors"))
    process.send_signal(signum)
    said = process.communicate()[1]
    if signum == signal.SIGKILL:
        with pytest.MonkeyPatch.context() as patch:  # the next run removes what that one left
            patch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
            with scratch("logits") as folder:
                assert list((tmp_path / "tmp").iterdir()) == [folder]
    else:
        assert process.returncode == 128 + signum
        assert "Traceback" not in said
    assert not list((tmp_path / "tmp").iterdir())


def test_a_temporary_folder_in_use_is_not_swept(tmp_path):
    with scratch("x", tmp_path) as one, scratch("x", tmp_path) as two:
        assert one.is_dir() and two.is_dir() and one != two
    (tmp_path / ".surgery-x-mine").mkdir()  # no lock, so not known to be ours
    (tmp_path / ".surgery-x-far").mkdir()
    (tmp_path / ".surgery-x-far/.surgery-lock").write_text("another-machine")
    with scratch("x", tmp_path):
        assert (tmp_path / ".surgery-x-mine").is_dir() and (tmp_path / ".surgery-x-far").is_dir()


# -- what is printed


def test_text_from_files_is_escaped_and_cut():
    assert printable(EVIL) == "\\x1b]0;owned\\x07\\x1b[2J\\x00\\u202egnp.\\u200b\\r"
    assert printable("a\nb\tü", 3) == "a\nb..."
    assert printable("\udcff") == "\\udcff"
    text = some([EVIL, "ü", "x" * 5_000_000, r"C:\new"])
    assert text.startswith("\\x1b]0;owned") and "\\xfc" in text and "..." in text and len(text) < 400
    assert text.endswith(r"C:\new")  # what was escaped before stays as it is
    error = FileError(f"is {EVIL}" + "y" * 10_000, file=f"/tmp/{EVIL}", member=EVIL, hint=EVIL)
    assert clean(str(error)) and len(str(error)) < 5000


def clean(text):
    return all(c.isprintable() or c in "\n\t" for c in text)


def header(folder, change):
    """Change the header of the weights."""
    import json

    path = folder / "model.safetensors"
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    head = json.loads(raw[8 : 8 + size])
    change(head)
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def config(folder, **keys):
    import json

    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
PLACES = {
    "a tensor": lambda d: header(d, lambda head: head.update({EVIL: EMPTY})),
    "a long tensor": lambda d: header(d, lambda head: head.update({EVIL + "x" * 5_000_000: EMPTY})),
    "a thousand tensors": lambda d: header(d, lambda head: head.update({f"{EVIL}{i}": EMPTY for i in range(1000)})),
    "a missing tensor": lambda d: header(d, lambda head: head.update({EVIL: head.pop("model.norm.weight")})),
    "a dtype": lambda d: header(d, lambda head: head["model.norm.weight"].update(dtype=EVIL)),
    "metadata": lambda d: header(d, lambda head: head.update(__metadata__={EVIL: EVIL})),
    "a key": lambda d: config(d, **{EVIL: 1}),
    "a value": lambda d: config(d, torch_dtype=EVIL, hidden_act=EVIL),
    "a type": lambda d: config(d, model_type=EVIL),
    "a rope": lambda d: config(d, rope_parameters={"rope_type": EVIL}),
    "a rope's key": lambda d: config(d, rope_parameters={"rope_type": "default", "rope_theta": 1e4, EVIL: 1}),
    "an architecture": lambda d: config(d, architectures=[EVIL]),
    "an index": lambda d: (d / "model.safetensors").rename(d / "model.safetensors.index.json").write_text(
        '{"weight_map": {"\\u001b[2J": "\\u001b"}}'),
    "a token": lambda d: (d / "tokenizer.json").write_text(
        '{"model": {"type": "BPE", "vocab": {"\\u001b[2J": 0}, "merges": []}, "added_tokens": '
        '[{"id": 0, "content": "\\u001b[2J\\u202e"}]}'),
    "a file": lambda d: (d / "x\x1b[2J\r.safetensors").write_bytes(b""),
    "a record": lambda d: (d / "surgery.json").write_text('{"run": {"\\u001b[2J": 1}}'),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_no_text_from_a_file_reaches_the_terminal_raw(place, tiny_hf, tmp_path):
    import shutil

    folder = tmp_path / "model\x1b[2J"
    shutil.copytree(tiny_hf("llama"), folder)
    PLACES[place](folder)
    for words in (
        ("inspect", folder, "--tensors", "--pickles"),
        ("inspect", folder, "--json"),
        ("convert", folder, tmp_path / "out", "--to", "meta", "--dry-run"),
        ("convert", folder, tmp_path / "out", "--to", "hf", "--tokenizer", folder),
        ("verify", folder, tiny_hf("llama")),
        ("verify", tiny_hf("llama"), folder),
    ):
        done = run(*words)
        assert clean(done.output), ascii(done.output)
        assert len(done.output) < 60_000 and done.output


def test_commands_print_through_the_one_door():
    """What is not JSON goes through `terminal.say` or `console.console`, which escape it."""
    for path in Path(cli.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and path.name not in ("terminal.py", "console.py"):
                name, said = ast.unparse(node.func), ast.unparse(node)
                assert name not in ("print", "click.secho", "Console"), (path, said)
                assert name != "click.echo" or said.startswith("click.echo(json.dumps("), (path, said)


@pytest.mark.slow
def test_a_terminal_of_another_encoding_is_no_obstacle(tiny_hf, tmp_path):
    command = [sys.executable, "-m", "surgery", "convert", tiny_hf("llama"), os.fsencode(tmp_path) + b"/a\xff\xc3\xbc",
               "--to", "hf"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, env=ENV | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert b"a\\udcff\\xfc" in done.stdout.replace(b"\n", b"")


@pytest.mark.parametrize("umask", [0o777, 0o277])
def test_a_umask_takes_no_rights_from_the_owner(umask, tiny_hf, tmp_path):
    """Whoever is no superuser could not enter the hidden folder, nor go on with what a stopped run has left in it."""
    out = tmp_path / "out"
    before = os.umask(umask)
    try:
        done = run("convert", tiny_hf("llama"), out, "--to", "hf")
        assert done.exit_code == 0 and os.umask(umask) == umask
        assert out.stat().st_mode & 0o777 == 0o700
        assert {p.stat().st_mode & 0o777 for p in out.iterdir()} == {0o600}
        for _ in range(2):  # a program that uses the library keeps its umask
            with pytest.raises(OutputError, match="umask 022"):
                surgery.convert(tiny_hf("llama"), tmp_path / "again", to="hf")
            assert not hidden_of(tmp_path / "again").exists()
    finally:
        os.umask(before)
