"""Folders planned by dcp_writer are loaded by torch's own distributed checkpoint readers."""

from __future__ import annotations

import pickletools
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save  # noqa: E402

from surgery.containers.dcp_writer import dcp_files  # noqa: E402
from surgery.containers.output import OutputFile  # noqa: E402
from surgery.containers.pickles.pickler import Record  # noqa: E402
from surgery.tensors.in_memory import InMemory  # noqa: E402
from surgery.tensors.lazy import Slice, same_bits  # noqa: E402
from surgery.writing import stream  # noqa: E402

DTYPES = ("float32", "bfloat16", "float16", "float64", "int64", "uint8", "bool", "float8_e4m3fn")


def held(*shape: int, kind: str = "float32", seed: int = 0) -> InMemory:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32) * 3
    return InMemory(numbers.to(getattr(torch, kind)))


def write(files: list[OutputFile], folder: Path) -> Path:
    stream.write(files, folder, max_memory=1 << 20, job={"files": len(files)}, ledger=None, progress=None, force=False)
    return folder


def load(folder: Path, tensors: dict[str, InMemory]) -> dict[str, torch.Tensor]:
    """Into tensors of our own, as a training program does."""
    state = {name: torch.zeros(t.shape, dtype=t.torch_dtype) for name, t in tensors.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return state


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, InMemory]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert same_bits(found[name], tensor.tensor), name


@pytest.mark.parametrize("kind", DTYPES)
def test_every_dtype_and_shape(tmp_path: Path, kind: str) -> None:
    tensors = {
        "matrix": held(5, 7, kind=kind, seed=1),
        "vector": held(11, kind=kind, seed=2),
        "scalar": held(kind=kind, seed=3),
        "cube": held(2, 3, 4, kind=kind, seed=4),
    }
    folder = write(dcp_files("", tensors), tmp_path / "out")
    assert sorted(p.name for p in folder.iterdir() if "distcp" in p.name or p.name == ".metadata") == [
        ".metadata",
        "__0_0.distcp",
    ]
    assert_same(load(folder, tensors), tensors)


def test_empty_tensor(tmp_path: Path) -> None:
    tensors = {"empty": held(0, 4), "after": held(3, 4)}
    assert_same(load(write(dcp_files("", tensors), tmp_path / "out"), tensors), tensors)


@pytest.mark.parametrize("chunk_bytes", [1, 100, 1000, 4096])
def test_chunks_and_files_are_joined_again(tmp_path: Path, chunk_bytes: int) -> None:
    tensors = {"stack": held(3, 5, 7, seed=5), "rows": held(37, 6, seed=6), "norm": held(9, seed=7)}
    files = dcp_files("", tensors, chunk_bytes=chunk_bytes, file_bytes=8000, rank=3)
    names = [f.name for f in files]
    assert names[:-1] == [f"__3_{i}.distcp" for i in range(len(names) - 1)]
    assert names[-1] == ".metadata"
    assert all(f.size <= 8000 or len(f.regions) == 1 for f in files[:-1])
    folder = write(files, tmp_path / "out")
    metadata = dcp.FileSystemReader(folder).read_metadata()
    sizes = {k: [c.sizes.numel() * 4 for c in v.chunks] for k, v in metadata.state_dict_metadata.items()}
    assert all(n <= max(chunk_bytes, 4) for ns in sizes.values() for n in ns)
    assert {k: sum(ns) for k, ns in sizes.items()} == {k: t.nbytes for k, t in tensors.items()}
    assert_same(load(folder, tensors), tensors)


def test_chunks_are_boxes_of_rows_in_order(tmp_path: Path) -> None:
    whole = held(40, 3, seed=8)
    folder = write(dcp_files("", {"w": whole}, chunk_bytes=84), tmp_path / "out")
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata["w"]
    assert [tuple(c.offsets) for c in metadata.chunks] == [(i, 0) for i in range(0, 40, 7)]
    assert_same(load(folder, {"w": whole}), {"w": whole})


def test_objects_and_nesting_are_unflattened(tmp_path: Path) -> None:
    tensors = {"model.layers.0.weight": held(4, 3), "step": held()}
    objects = {"optim.group": {"lr": 0.1, "betas": (0.9, 0.95)}, "none": [None]}
    paths = {
        "model.layers.0.weight": ("model", "layers.0.weight"),
        "step": ("step",),
        "optim.group": ("optim", "group"),
        "none": ("none",),
    }
    folder = write(dcp_files("", tensors, objects, planner=paths), tmp_path / "out")
    dcp_to_torch_save(folder, tmp_path / "all.pt")
    tree = torch.load(tmp_path / "all.pt", weights_only=True)
    assert tree.keys() == {"model", "step", "optim", "none"}
    assert same_bits(tree["model"]["layers.0.weight"], tensors["model.layers.0.weight"].tensor)
    assert tree["optim"]["group"] == {"lr": 0.1, "betas": (0.9, 0.95)}
    assert tree["none"] == [None]


def test_every_chunk_is_a_torch_file_of_its_own(tmp_path: Path) -> None:
    tensors = {"a": held(6, 5, kind="bfloat16"), "b": held(10)}
    folder = write(dcp_files("", tensors, chunk_bytes=20), tmp_path / "out")
    places = dcp.FileSystemReader(folder).read_metadata().storage_data
    assert {p.relative_path for p in places.values()} == {"__0_0.distcp"}
    data = (folder / "__0_0.distcp").read_bytes()
    for index, place in places.items():
        assert place.offset % 64 == 0
        (tmp_path / "one.pt").write_bytes(data[place.offset : place.offset + place.length])
        piece = torch.load(tmp_path / "one.pt", weights_only=True, mmap=True)
        where = tuple(slice(a, a + n) for a, n in zip(index.offset, piece.shape, strict=True))
        assert same_bits(piece, tensors[index.fqn].tensor[where])


def test_metadata_names_only_torch_and_no_path(tmp_path: Path) -> None:
    files = dcp_files("model_and_optim/", {"w": held(4, 4)}, {"o": 1})
    assert [f.name for f in files] == ["model_and_optim/__0_0.distcp", "model_and_optim/.metadata"]
    names = {arg for op, arg, _ in pickletools.genops(files[-1].head) if op.name == "GLOBAL"}
    assert {str(name).split(" ")[0].split(".")[0] for name in names} == {"torch"}
    assert dcp_files("model_and_optim/", {"w": held(4, 4)}, {"o": 1})[-1].head == files[-1].head


def test_views_of_larger_tensors_are_stored_alone(tmp_path: Path) -> None:
    big = held(64, 8, seed=9)
    piece = Slice(big, 0, 8, 12)
    files = dcp_files("", {"piece": piece})
    assert files[0].size < 4 * 8 * 4 + 2000
    folder = write(files, tmp_path / "out")
    assert_same(
        load(folder, {"piece": InMemory(big.tensor[8:12].clone())}), {"piece": InMemory(big.tensor[8:12].clone())}
    )


def test_a_record_that_is_made_without_its_initialiser() -> None:
    from surgery.containers.pickles.pickler import pickle_tree

    data, _ = pickle_tree(Record("collections", "UserDict", (), {"data": {"a": 1}}, new=True))
    ops = [op.name for op, _, _ in pickletools.genops(data)]
    assert "NEWOBJ" in ops
    assert "REDUCE" not in ops


def test_planning_many_tensors_is_quick() -> None:
    import time

    from surgery.tensors.lazy import Fill

    began = time.monotonic()
    tensors = {f"layers.{i}.w": Fill((64, 64), "bfloat16") for i in range(5000)}
    files = dcp_files("", tensors)
    assert len(files[0].regions) == 5000
    assert time.monotonic() - began < 10
