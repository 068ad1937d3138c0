"""What torch, safetensors and DCP write is read bit for bit, lazily, and without importing what is not needed."""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from attacks.folders import Draft, saved
from surgery.containers import open_file, open_tensors
from surgery.containers.dcp import Dcp
from surgery.containers.safetensors import Safetensors
from surgery.containers.torch_legacy import TorchLegacy
from surgery.containers.torch_zip import TorchZip
from surgery.containers.zip_directory import ZipDirectory
from surgery.errors import FileError
from surgery.formats.olmo.names import decode_names, is_encoded
from surgery.tensors.chunked import Chunk, Chunked
from surgery.tensors.extent import Extent
from surgery.tensors.files import IO, File
from surgery.tensors.lazy import ITEMSIZE, same_bits

# torch warns of its experimental dtypes, of TorchScript and of a save without process group: none is our doing
pytestmark = pytest.mark.filterwarnings("ignore")
DTYPES = [kind for kind in ITEMSIZE if hasattr(torch, kind)]


def filled(kind: str, shape: tuple[int, ...] = (3, 5)) -> torch.Tensor:
    """Every byte different from its neighbours, and valid for the dtype."""
    count = int(np.prod(shape))
    if kind == "bool":
        return (torch.arange(count) % 3 == 0).reshape(shape)
    raw = torch.arange(count * ITEMSIZE[kind], dtype=torch.int32) * 37 % 251
    return raw.to(torch.uint8).view(getattr(torch, kind)).reshape(shape)


def check(found: Any, expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].torch_dtype) == (tuple(tensor.shape), tensor.dtype)
        assert same_bits(found[name].full(), tensor.detach().contiguous()), name


@pytest.mark.parametrize("kind", DTYPES)
def test_every_dtype_of_torch_files(kind: str, tmp_path: Path) -> None:
    expected = {"w": filled(kind), "scalar": filled(kind, (1,))[0], "empty": filled(kind, (0, 4))}
    torch.save(expected, tmp_path / "zip.pt")
    check(open_tensors(tmp_path / "zip.pt"), expected)
    torch.save(expected, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    assert isinstance(open_file(tmp_path / "legacy.pt"), TorchLegacy)
    check(open_tensors(tmp_path / "legacy.pt"), expected)  # also the dtypes that torch cannot read back itself


@pytest.mark.parametrize("kind", [k for k in DTYPES if k not in ("complex32", "complex128", "float8_e8m0fnu")])
def test_every_dtype_of_safetensors(kind: str, tmp_path: Path) -> None:
    expected = {"a": filled(kind), "b": filled(kind, (2, 1, 2)), "s": filled(kind, (1,)).reshape(())}
    safetensors.torch.save_file(expected, tmp_path / "x.safetensors", {"format": "pt", "k": "v"})
    table = open_tensors(tmp_path / "x.safetensors")
    assert table.metadata == {"format": "pt", "k": "v"} and table.globals == ()
    for name, tensor in expected.items():
        assert same_bits(table[name].full(), tensor), name


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_views_parameters_and_structure(tmp_path: Path, protocol: int, zipped: bool) -> None:
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    parameter = torch.nn.Parameter(base[1].clone())
    attributed = torch.nn.Parameter(base[0].clone())
    attributed.tensor_model_parallel = True  # type: ignore[attr-defined]
    tree = {
        "transposed": base.permute(2, 0, 1),
        "narrow": base[:, 1:3, 2:4],
        "strided": base[::2, ::3],
        "expanded": torch.tensor([1.0, 2.0]).expand(4, 2),
        "list": [base, (base[0, 0], base[1:].permute(0, 2, 1))],
        "module": torch.nn.Linear(3, 2).state_dict(),
        "parameter": parameter,
        "attributed": attributed,
        "args": argparse.Namespace(hidden=4, dtype=torch.bfloat16, size=torch.Size((1, 2))),
        "step": 7,
    }
    torch.save(tree, tmp_path / "x.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    found = open_file(tmp_path / "x.pt")
    expected = {
        "transposed": tree["transposed"], "narrow": tree["narrow"], "strided": tree["strided"],
        "expanded": tree["expanded"], "list.0": base, "list.1.0": base[0, 0],
        "list.1.1": base[1:].permute(0, 2, 1), "module.weight": tree["module"]["weight"],
        "module.bias": tree["module"]["bias"], "parameter": parameter, "attributed": attributed,
    }  # fmt: skip
    check(found.tensors, expected)
    assert isinstance(found, (TorchZip, TorchLegacy))
    assert found.root["step"] == 7 and found.root["args"].state["size"] == (1, 2)
    assert found.root["args"].state["dtype"].path == "torch.bfloat16"
    assert found.root["attributed"].attrs == {"tensor_model_parallel": True}
    assert "argparse.Namespace" in found.globals


def test_one_tensor_under_two_names_is_one_object(tmp_path: Path) -> None:
    tensor = torch.ones(3)
    torch.save({"a": tensor, "b": tensor, "c": tensor[:]}, tmp_path / "x.pt")
    table = open_tensors(tmp_path / "x.pt")
    assert table["a"] is table["b"] and table["a"] is not table["c"]
    assert isinstance(table["a"], Extent) and isinstance(table["c"], Extent)
    assert table["a"].offset == table["c"].offset


def test_boxes_of_a_shared_storage(tmp_path: Path) -> None:
    flat = torch.arange(1000, dtype=torch.int16)
    tree = {"a": flat[100:400].view(10, 30), "b": flat[400:].view(20, 30).t()}
    torch.save(tree, tmp_path / "x.pt")
    table, random_ = open_tensors(tmp_path / "x.pt"), random.Random(0)
    for _ in range(40):
        for name, tensor in tree.items():
            box = tuple(tuple(sorted(random_.sample(range(n + 1), 2))) for n in tensor.shape)
            assert torch.equal(table[name].read(box), tensor[tuple(slice(*ab) for ab in box)])  # type: ignore[arg-type]


def test_opening_reads_no_tensor_data(tmp_path: Path) -> None:
    weights = {f"w{k}": torch.zeros(1 << 20, dtype=torch.uint8) for k in range(8)}
    torch.save(weights, tmp_path / "zip.pt")
    torch.save(weights, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(weights, tmp_path / "x.safetensors")
    for name, limit in (("zip.pt", 6000), ("legacy.pt", (1 << 20) + 1000), ("x.safetensors", 2000)):
        IO.clear()
        table = open_tensors(tmp_path / name)
        assert IO["bytes"] < limit, name
        IO.clear()
        table["w3"].read(((100, 200),))
        assert IO["bytes"] == 100


def test_opening_imports_neither_torch_nor_numpy(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2), "rng": np.random.get_state(), "n": np.float32(1)}, tmp_path / "x.pt")
    Draft(tmp_path).write()
    (tmp_path / "c.yaml").write_text("a: 1")
    program = (
        "import sys; from surgery.containers import open_file, open_tensors\n"
        "from surgery.containers.text import read_yaml\n"
        f"open_file({str(tmp_path / 'x.pt')!r}).tensors; open_tensors({str(tmp_path)!r})\n"
        f"read_yaml({str(tmp_path / 'c.yaml')!r})\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_files_of_other_writers(tmp_path: Path) -> None:
    """torch's switches: wrong CRCs, another alignment; and names inside the archive that follow the file's."""
    old = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(4)}, tmp_path / "pytorch_model-00001.bin")
    finally:
        torch.serialization.set_crc32_options(old)
    check(open_tensors(tmp_path / "pytorch_model-00001.bin"), {"w": torch.arange(4)})


def test_zip_directory_against_the_file(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(40)}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "y").write_bytes(b"before" + data + b"after")
    for file, base, length in ((File(tmp_path / "x.pt"), 0, None), (File(tmp_path / "y"), 6, len(data))):
        directory = ZipDirectory(file, base, length)
        offset, size = directory.span("x/data/0")
        assert file.read(offset, size) == torch.arange(40).numpy().tobytes()
        assert (offset - base) % 64 == 0


def test_script_modules_are_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "x.pt"))
    with pytest.raises(FileError, match="TorchScript"):
        open_file(tmp_path / "x.pt")


def test_special_tensors_are_refused_by_name(tmp_path: Path) -> None:
    cases = {
        "sparse": torch.eye(3).to_sparse(),
        "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "conjugated": torch.ones(2, dtype=torch.complex64).conj(),
        "meta": torch.ones(3, device="meta"),
    }
    for name, tensor in cases.items():
        torch.save({"good": torch.ones(2), f"bad.{name}": tensor}, tmp_path / "x.pt")
        with pytest.raises(FileError, match=f"bad.{name}|unknown storage type"):
            open_tensors(tmp_path / "x.pt")


def shard(folder: Path, names: list[str], file: str, index: str, save: Any) -> dict[str, torch.Tensor]:
    """Two shards and an index as transformers writes them."""
    weights = {name: torch.randn(3, 2) for name in names}
    half, weight_map = len(names) // 2, {}
    for k, part in enumerate((names[:half], names[half:])):
        shard_name = file.format(k + 1)
        save({name: weights[name] for name in part}, folder / shard_name)
        weight_map |= dict.fromkeys(part, shard_name)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return weights


def test_folders_and_indexes(tmp_path: Path) -> None:
    names = ["model.norm.weight", "a.b", "c"]
    (st := tmp_path / "st").mkdir()
    weights = shard(st, names, "model-0000{}-of-00002.safetensors", "model.safetensors.index.json",
                    safetensors.torch.save_file)  # fmt: skip
    check(open_tensors(st), weights)
    check(open_tensors(st / "model.safetensors.index.json"), weights)
    assert len(open_tensors(st).containers) == 2
    (pt := tmp_path / "pt").mkdir()
    weights = shard(pt, names, "pytorch_model-0000{}-of-00002.bin", "pytorch_model.bin.index.json", torch.save)
    check(open_tensors(pt), weights)
    assert "torch._utils._rebuild_tensor_v2" in open_tensors(pt).globals
    (one := tmp_path / "one").mkdir()
    safetensors.torch.save_file(weights, one / "model.safetensors")
    torch.save({"other": torch.ones(1)}, one / "pytorch_model.bin")
    assert set(open_tensors(one)) == set(weights)  # safetensors first, as transformers does


def test_dcp_as_torch_writes_it(tmp_path: Path) -> None:
    state = {
        "model": {"w": filled("bfloat16", (6, 4)), "b": filled("float32", (7,)), "s": torch.tensor(3.5)},
        "step": 12,
        "names": ["a", {"b": 1}],
    }
    torch_dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    dcp = Dcp(tmp_path)
    expected = {f"model.{name}": tensor for name, tensor in state["model"].items()}  # type: ignore[attr-defined]
    assert set(dcp.tensors) == set(expected)
    for name, tensor in expected.items():
        assert same_bits(dcp.tensors[name].full(), tensor)
    described = {name: describe() for name, describe in dcp.objects.items()}
    assert described == {"step": 12, "names.0": "a", "names.1.b": 1} or described["step"] == 12
    assert set(open_tensors(tmp_path)) == set(open_tensors(tmp_path / ".metadata")) == set(expected)


def spread(folder: Path, tensor: torch.Tensor, boxes: list[tuple[tuple[int, int], ...]]) -> Dcp:
    """A DCP folder of one tensor cut into these boxes."""
    chunks, places, data = [], {}, b""
    for box in boxes:
        start = torch.Size(a for a, _ in box)
        blob = saved(tensor[tuple(slice(*ab) for ab in box)].clone())
        chunks.append(ChunkStorageMetadata(start, torch.Size(b - a for a, b in box)))
        places[MetadataIndex("w", start)] = _StorageInfo("__0_0.distcp", len(data), len(blob))
        data += blob
    (folder / "__0_0.distcp").write_bytes(data)
    record = Metadata({"w": TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, chunks)}, None, places)
    (folder / ".metadata").write_bytes(pickle.dumps(record))
    return Dcp(folder)


def test_any_box_of_chunks_reads_only_what_it_touches(tmp_path: Path) -> None:
    tensor, random_ = torch.arange(6 * 8 * 10, dtype=torch.int32).reshape(6, 8, 10), random.Random(1)
    cuts = [[0, 1, 4, 6], [0, 5, 8], [0, 3, 7, 10]]
    boxes = [
        ((a, b), (c, d), (e, f))
        for a, b in zip(cuts[0], cuts[0][1:], strict=False)
        for c, d in zip(cuts[1], cuts[1][1:], strict=False)
        for e, f in zip(cuts[2], cuts[2][1:], strict=False)
    ]
    random_.shuffle(boxes)
    lazy = spread(tmp_path, tensor, boxes).tensors["w"]
    lazy.full()  # opens all chunks
    for _ in range(60):
        box = tuple(tuple(sorted(random_.sample(range(n + 1), 2))) for n in tensor.shape)
        IO.clear()
        expected = tensor[tuple(slice(*ab) for ab in box)]
        assert torch.equal(lazy.read(box), expected)  # type: ignore[arg-type]
        assert IO["bytes"] == expected.nbytes


def test_chunks_that_are_no_grid(tmp_path: Path) -> None:
    tensor = torch.arange(48).reshape(6, 8)
    wheel = [((0, 2), (0, 5)), ((0, 4), (5, 8)), ((4, 6), (3, 8)), ((2, 6), (0, 3)), ((2, 4), (3, 5))]
    lazy = spread(tmp_path, tensor, wheel).tensors["w"]
    assert isinstance(lazy, Chunked) and torch.equal(lazy.full(), tensor)
    assert len(list(lazy.touched(((0, 1), (0, 1))))) == 1
    overlapping = [((0, 3), (0, 8)), ((2, 5), (0, 8))]  # the volume fits, but row 5 is missing
    with pytest.raises(FileError, match="overlap"):
        spread(tmp_path, tensor, overlapping)


def test_many_chunks_are_found_quickly() -> None:
    """64 layers of 128 experts: reading one expert must not look at 8,192 chunks."""
    opened: list[tuple[int, ...]] = []

    def chunk(start: tuple[int, ...]) -> Chunk:
        def open_() -> Any:
            opened.append(start)
            raise FileError("opened")

        return Chunk(start, (1, 1, 4), open_)

    lazy = Chunked("w", (64, 128, 4), "float32", [chunk((l, e, 0)) for l in range(64) for e in range(128)], "file")
    for layer in range(64):
        assert [c.start for c in lazy.touched(((layer, layer + 1), (5, 6), (0, 4)))] == [(layer, 5, 0)]
    with pytest.raises(FileError, match="opened"):
        lazy.read(((3, 4), (7, 8), (1, 2)))
    assert opened == [(3, 7, 0)]


def test_records_of_dcp_are_known_by_their_last_name(tmp_path: Path) -> None:
    """Megatron and OLMo-core subclass torch's records in modules of their own."""
    Draft(tmp_path).write()
    data = (tmp_path / ".metadata").read_bytes()
    old, new = b"torch.distributed.checkpoint.filesystem", b"olmo_core_xxx.distributed.checkpoint.fs"
    assert old in data and len(old) == len(new)
    (tmp_path / ".metadata").write_bytes(data.replace(old, new))
    dcp = Dcp(tmp_path)
    assert torch.equal(dcp.tensors["w"].full(), torch.arange(32.0).reshape(8, 4))
    assert "olmo_core_xxx.distributed.checkpoint.fs._StorageInfo" in dcp.globals


def test_olmo_names(tmp_path: Path) -> None:
    import base64

    def encode(keys: tuple[Any, ...], pickled: bool) -> str:
        return base64.urlsafe_b64encode(pickle.dumps((keys, pickled))).decode()

    groups = [{"lr": 0.1, "betas": (0.9, 0.95)}]
    tensors = {
        encode(("transformer.wte.weight",), False): torch.ones(2),
        encode(("state", 3, "exp_avg"), False): torch.zeros(3),
        encode(("param_groups",), True): torch.frombuffer(bytearray(pickle.dumps(groups)), dtype=torch.uint8),
    }
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    st = open_file(tmp_path / "x.safetensors")
    assert isinstance(st, Safetensors) and is_encoded(st.tensors) and not is_encoded({"model.w": 0})
    plain, pickled = decode_names(st.tensors, "x")
    assert set(plain) == {"transformer.wte.weight", "state.3.exp_avg"} and set(pickled) == {"param_groups"}


def test_a_file_that_shrinks_after_opening_is_an_error(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1 << 16)}, tmp_path / "x.pt")
    table = open_tensors(tmp_path / "x.pt")
    os.truncate(tmp_path / "x.pt", 5000)
    with pytest.raises(FileError, match="the file ends before byte"):
        table["w"].full()


def test_ordered_dictionaries_keep_torchs_metadata(tmp_path: Path) -> None:
    out = io.BytesIO()
    state = torch.nn.Linear(2, 2).state_dict()
    assert isinstance(state, collections.OrderedDict)
    torch.save(state, out)
    (tmp_path / "x.pt").write_bytes(out.getvalue())
    root = open_file(tmp_path / "x.pt").root  # type: ignore[union-attr]
    assert root.attrs["_metadata"] == {"": {"version": 1}}
