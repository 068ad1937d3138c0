"""Written files are read back by the real libraries: torch.load, safetensors, zipfile."""

import argparse
import json
import math
import pickletools
import zipfile
import zlib
from collections import OrderedDict

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from surgery.containers.output import OutputFile, Region, copied_file, text_file
from surgery.containers.safetensors import CODES, safetensors_file
from surgery.containers.torch_writer import Record, torch_file
from surgery.errors import FileError, LayoutError
from surgery.tensors.in_memory import InMemory
from surgery.tensors.lazy import ITEMSIZE, Fill, Lazy, same_bits, torch_dtype
from surgery.writing.stream import write

SHAPES = [(), (0, 4), (1,), (3,), (2, 3), (2, 0), (1, 1, 5), (7, 2, 3)]


class Imagined(Lazy):
    """A tensor of any size that nobody reads."""

    def __init__(self, shape, kind):
        self.shape, self.dtype = shape, kind


def random_tensor(shape, kind):
    n = math.prod(shape) * ITEMSIZE[kind]
    raw = torch.randint(0, 2 if kind == "bool" else 256, (max(n, 16),), dtype=torch.uint8)[:n].clone()
    return raw.view(torch_dtype(kind)).reshape(shape) if n else torch.empty(shape, dtype=torch_dtype(kind))


def save(file, folder):
    """Write one planned file, whose size must be as planned."""
    write([file], folder / "out", max_memory=1 << 20, job={})
    path = folder / "out" / file.name
    assert path.stat().st_size == file.size
    return path


def loads(path):
    yield torch.load(path, weights_only=True)
    yield torch.load(path, weights_only=True, mmap=True)
    with path.open("rb") as stream:
        yield torch.load(stream, weights_only=True)


@pytest.mark.parametrize("kind", sorted(ITEMSIZE))
def test_torch_loads_every_dtype_and_shape(kind, tmp_path):
    tensors = {f"t{i}": random_tensor(shape, kind) for i, shape in enumerate(SHAPES)}
    path = save(torch_file("m.pt", {k: InMemory(t) for k, t in tensors.items()}), tmp_path)
    for got in loads(path):
        assert list(got) == list(tensors)
        assert all(same_bits(got[k], t) and got[k].stride() == t.stride() for k, t in tensors.items())
        assert not any(t.requires_grad for t in got.values())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_torch_file_is_laid_out_as_torch_save_does(tmp_path):
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2, 3).bfloat16()}
    torch.save(tensors, tmp_path / "m.pt")
    path = save(torch_file("m.pt", {k: InMemory(t) for k, t in tensors.items()}), tmp_path)
    with zipfile.ZipFile(tmp_path / "m.pt") as theirs, zipfile.ZipFile(path) as ours:
        want = {n for n in theirs.namelist() if not n.endswith("serialization_id")}
        assert set(ours.namelist()) == want
        for name in want - {"m/data.pkl"}:
            assert ours.read(name) == theirs.read(name)
        assert list(map(opcode_name, genops(ours))) == list(map(opcode_name, genops(theirs)))
    data = path.read_bytes()
    with zipfile.ZipFile(path) as ours:
        for info in ours.infolist():
            at = info.header_offset
            start = at + 30 + int.from_bytes(data[at + 26 : at + 28], "little")
            start += int.from_bytes(data[at + 28 : at + 30], "little")
            assert start % 64 == 0
            assert data[start : start + info.file_size] == ours.read(info.filename)
            assert int.from_bytes(data[at + 14 : at + 18], "little") == info.CRC == zlib.crc32(ours.read(info.filename))


def genops(archive):
    """Opcodes without the memo, of which torch writes more than is used."""
    ops = pickletools.genops(archive.read("m/data.pkl"))
    return [op for op in ops if not op[0].name.startswith(("BINPUT", "BINGET", "GLOBAL", "BINUNICODE"))]


def opcode_name(op):
    return op[0].name, op[1]


def test_two_files_of_the_same_tensors_are_the_same_bytes(tmp_path):
    tree = {"a": InMemory(torch.arange(9.0)), "n": 1}
    one = save(torch_file("m.pt", tree), tmp_path / "x").read_bytes()
    assert one == save(torch_file("m.pt", tree), tmp_path / "y").read_bytes()


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=5)
        | st.dictionaries(st.text(), inner, max_size=3).map(OrderedDict)
    ),
    max_leaves=20,
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(PLAIN)
def test_plain_data_come_back_as_they_were(tmp_path_factory, tree):
    path = save(torch_file("m.pt", {"tree": tree}), tmp_path_factory.mktemp("t"))
    got = torch.load(path, weights_only=True)["tree"]
    assert got == tree
    assert typed(got) == typed(tree)


def typed(tree):
    """The types in a tree, so that 1, 1.0 and True differ."""
    if isinstance(tree, dict):
        return type(tree), [(typed(k), typed(v)) for k, v in tree.items()]
    if isinstance(tree, (list, tuple)):
        return type(tree), [typed(v) for v in tree]
    return type(tree)


def test_shared_objects_stay_shared(tmp_path):
    held, shared = InMemory(torch.arange(4.0)), [1, 2]
    tree = {"a": held, "b": held, "x": shared, "y": {"z": shared}, "other": InMemory(torch.arange(4.0))}
    tree["self"] = tree
    file = torch_file("m.pt", tree)
    assert [r.name for r in file.regions] == ["a", "other"]
    got = torch.load(save(file, tmp_path), weights_only=True)
    assert got["a"] is got["b"]
    assert got["x"] is got["y"]["z"]
    assert got["self"] is got
    assert got["a"].data_ptr() != got["other"].data_ptr()


def test_more_than_256_memoized_objects(tmp_path):
    lists = [[i] for i in range(70_000)]
    got = torch.load(save(torch_file("m.pt", lists + lists[-1:]), tmp_path), weights_only=True)
    assert got == lists + lists[-1:]
    assert got[-1] is got[-2]


def test_records_name_what_torch_resolves(tmp_path):
    args = Record("argparse", "Namespace", (), {"lr": 0.5, "dtype": Record("torch", "bfloat16")})
    tree = {"args": args, "again": args, "size": Record("torch", "Size", ((2, 3),)), "w": InMemory(torch.ones(2))}
    path = save(torch_file("m.pt", tree), tmp_path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        got = torch.load(path, weights_only=True)
    assert got["args"] == argparse.Namespace(lr=0.5, dtype=torch.bfloat16)
    assert got["args"] is got["again"]
    assert type(got["size"]) is torch.Size and got["size"] == (2, 3)


def test_copies_are_marked():
    tree = {"model": {"w": Fill((2,), "float32"), "v": Fill((2,), "float32")}, "list": [Fill((1,), "float32")]}
    file = torch_file("m.pt", tree, frozenset({"model.v", "list.0"}))
    assert [(r.name, r.copy) for r in file.regions] == [("model.w", False), ("model.v", True), ("list.0", True)]
    file = safetensors_file("m.safetensors", tree["model"], copies=frozenset({"w"}))
    assert [(r.name, r.copy) for r in file.regions] == [("w", True), ("v", False)]


@pytest.mark.parametrize("bad", [{1, 2}, object(), 1j, {"deep": [range(3)]}])
def test_other_objects_are_refused(bad):
    with pytest.raises(LayoutError, match="cannot be written to a torch file"):
        torch_file("m.pt", {"x": bad})


def test_too_deep_a_tree_is_refused():
    tree = []
    for _ in range(100_000):
        tree = [tree]
    with pytest.raises(LayoutError, match="nested too deep"):
        torch_file("m.pt", tree)


def ends(region):
    """What the files over 4 GiB hold: a name, zeros, a seven."""
    return region.name.encode()[:5].ljust(5), b"\x07"


def sparse(file, path):
    """The file as planned, its tensors mostly holes; CRCs only of the small ones."""
    crcs = []
    with path.open("wb") as out:
        out.truncate(file.size)
        for region in file.regions:
            first, last = ends(region)
            out.seek(region.offset)
            out.write(first)
            out.seek(region.stop - 1)
            out.write(last)
            n = region.tensor.nbytes
            crcs.append(zlib.crc32(first + bytes(n - 6) + last) if n < 1 << 20 else 0)
        for at, data in file.tail(crcs):
            out.seek(at)
            out.write(data)


def test_files_over_4_gib_are_zip64(tmp_path):
    """Offsets, sizes and both: mapped by torch and listed by zipfile, as holes that take no room on disk."""
    tree = {
        "before": Imagined((100,), "uint8"),
        "big": Imagined((5 << 30,), "uint8"),
        "after": Imagined((10, 7), "float32"),
        "exactly": Imagined(((1 << 32) - 1,), "uint8"),
        "under": Imagined(((1 << 32) - 2,), "uint8"),
    }
    file = torch_file("m.pt", tree)
    path = tmp_path / "m.pt"
    sparse(file, path)
    got = torch.load(path, weights_only=True, mmap=True)
    assert {k: (tuple(t.shape), t.dtype) for k, t in got.items()} == {
        k: (t.shape, torch_dtype(t.dtype)) for k, t in tree.items()
    }
    for key, tensor in got.items():
        flat = tensor.reshape(-1).view(torch.uint8)
        assert bytes(flat[:5].tolist()) == key.encode()[:5].ljust(5)
        assert flat[-1] == 7
    with zipfile.ZipFile(path) as archive:
        sizes = {i.filename: (i.file_size, i.header_offset) for i in archive.infolist()}
        assert [sizes[f"m/data/{i}"][0] for i in range(5)] == [t.nbytes for t in tree.values()]
        assert sizes["m/data/2"][1] > 5 << 30
        for i in (0, 2):
            assert archive.read(f"m/data/{i}")[:3] == list(tree)[i].encode()[:3]
        with archive.open("m/data/1") as member:
            assert member.read(3) == b"big"


@pytest.mark.slow
def test_more_members_than_16_bits_count(tmp_path):
    held = torch.arange(65_600, dtype=torch.int32)
    tree = [Fill((1,), "int32") for _ in held]
    file = torch_file("m.pt", tree)
    path = tmp_path / "m.pt"
    with path.open("wb") as out:
        out.truncate(file.size)
        data = [held[i : i + 1].numpy().tobytes() for i in range(len(held))]
        for region, raw in zip(file.regions, data, strict=True):
            out.seek(region.offset)
            out.write(raw)
        for at, raw in file.tail([zlib.crc32(raw) for raw in data]):
            out.seek(at)
            out.write(raw)
    got = torch.load(path, weights_only=True)
    assert torch.equal(torch.cat(got), held)
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == 65_605
        assert archive.read("m/data/65599") == data[-1]


# -- safetensors


@pytest.mark.parametrize("kind", sorted(ITEMSIZE))
def test_safetensors_loads_every_dtype_and_shape(kind, tmp_path):
    tensors = {f"t{i}": random_tensor(shape, kind) for i, shape in enumerate(SHAPES)}
    if kind not in CODES:
        with pytest.raises(LayoutError, match=f"safetensors has no dtype {kind}"):
            safetensors_file("m.safetensors", {k: InMemory(t) for k, t in tensors.items()})
        return
    path = save(safetensors_file("m.safetensors", {k: InMemory(t) for k, t in tensors.items()}), tmp_path)
    got = load_file(path)
    assert all(same_bits(got[k], t) for k, t in tensors.items())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        assert all(same_bits(file.get_tensor(k), t) for k, t in tensors.items())


def header(file):
    return json.loads(file.head[8:])


def test_safetensors_keeps_the_order_and_has_no_holes(tmp_path):
    tensors = {"z": torch.ones(3, 4), "a": torch.ones(5).half(), "m": torch.zeros(2, dtype=torch.bool)}
    file = safetensors_file("m.safetensors", {k: InMemory(t) for k, t in tensors.items()}, {"format": "pt", "x": "y"})
    assert list(header(file)) == ["__metadata__", "z", "a", "m"]
    assert len(file.head) % 64 == 0
    assert [r.offset for r in file.regions] == [len(file.head) + n for n in (0, 48, 58)]
    assert load_file(save(file, tmp_path)).keys() == tensors.keys()


def test_safetensors_puts_wider_elements_first_only_where_alignment_needs_it(tmp_path):
    tensors = {
        "b": torch.ones(3).bfloat16(),
        "f": torch.ones(3),
        "d": torch.ones(3).double(),
        "u": torch.ones(3).byte(),
    }
    file = safetensors_file("m.safetensors", {k: InMemory(t) for k, t in tensors.items()})
    assert [r.name for r in file.regions] == ["d", "f", "b", "u"]
    assert all(r.offset % ITEMSIZE[r.tensor.dtype] == 0 for r in file.regions)
    got = load_file(save(file, tmp_path))
    assert all(same_bits(got[k], t) for k, t in tensors.items())


def test_safetensors_without_metadata_or_tensors(tmp_path):
    assert header(safetensors_file("m.safetensors", {}, {})) == {}
    assert load_file(save(safetensors_file("m.safetensors", {}), tmp_path)) == {}


def test_safetensors_names_are_kept(tmp_path):
    names = ["a.b", "with space", 'quote"', "\u00fc\u4e2d", "back\\slash"]
    path = save(safetensors_file("m.safetensors", {n: Fill((1,), "float32", i) for i, n in enumerate(names)}), tmp_path)
    assert {k: v.item() for k, v in load_file(path).items()} == {n: i for i, n in enumerate(names)}
    with pytest.raises(LayoutError, match="__metadata__"):
        safetensors_file("m.safetensors", {"__metadata__": Fill((1,), "float32")})


def test_offsets_of_huge_safetensors():
    file = safetensors_file("m.safetensors", {k: Imagined((1 << 20, 1 << 13), "bfloat16") for k in "abc"})
    assert header(file)["c"]["data_offsets"] == [2 << 34, 3 << 34]
    assert file.size == len(file.head) + (3 << 34)


# -- small files and names


def test_copied_and_text_files(tmp_path):
    (tmp_path / "tok").write_bytes(bytes(range(256)) * 700)
    files = [copied_file("sub/tok", tmp_path / "tok"), text_file("config.json", b"{}"), text_file("empty", b"")]
    write(files, tmp_path / "out", max_memory=1 << 15, job={})
    assert (tmp_path / "out/sub/tok").read_bytes() == (tmp_path / "tok").read_bytes()
    assert (tmp_path / "out/config.json").read_bytes() == b"{}"
    assert (tmp_path / "out/empty").read_bytes() == b""
    with pytest.raises(FileError):
        copied_file("x", tmp_path / "nothing")


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/", ".", "a\0b", "a\\b", "x" * 256])
def test_names_that_leave_the_folder_are_refused(name):
    with pytest.raises(LayoutError, match="cannot be the name of an output file"):
        text_file(name, b"")


def test_plans_that_overlap_are_our_own_mistake():
    with pytest.raises(AssertionError, match="overlaps"):
        OutputFile("x", 10, b"head", (Region("r", Fill((2,), "uint8"), 3),))
    with pytest.raises(AssertionError, match="too small"):
        OutputFile("x", 5, b"head", (Region("r", Fill((2,), "uint8"), 4),))
