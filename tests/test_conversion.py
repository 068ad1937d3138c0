"""Conversions end to end: bits, bytes read, memory, provenance, plans, casts, vocabularies, refusals, resuming."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.conversion import convert as conversion
from surgery.errors import FileError, LayoutError, OutputError, SurgeryError, UsageError
from surgery.formats.registry import open_checkpoint
from surgery.formats.topology import Topology
from surgery.tensors.files import IO
from tests import oracle, tiny


def weights(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float16"), ("llama3", "float32"), ("llama_tied", "bfloat16")])
def test_hf_to_meta_to_hf_keeps_every_bit(family, dtype, tmp_path):
    factor = {"llama3": 8.0, "llama_tied": 32.0}.get(family)
    rope = {**tiny.LLAMA3, "factor": factor, "original_max_position_embeddings": 8192} if factor else None
    source = tiny.save(family, tmp_path / "source", dtype, **({"rope_parameters": rope} if rope else {}))
    there = surgery.convert(source, tmp_path / "meta", to="meta", topology=Topology(tp=2))
    back = surgery.convert(tmp_path / "meta", tmp_path / "back", to="hf")
    assert there.content_digest == back.content_digest == there.source_digest
    assert there.verified
    assert back.verified
    ours, theirs = weights(tmp_path / "back"), weights(source)
    assert ours.keys() == theirs.keys()
    assert all(oracle.same_bits(ours[k], theirs[k]) for k in theirs)
    ids = torch.randint(0, tiny.SIZES["v"], (1, 100), generator=torch.Generator().manual_seed(5))
    assert torch.equal(oracle.hf_logits(tmp_path / "back", ids), oracle.hf_logits(source, ids))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_hf_to_itself_is_the_identity(family, tiny_hf, tmp_path):
    surgery.convert(tiny_hf(family), tmp_path / "copy", to="hf", options={"shard_size": "300kB"})
    ours, theirs = weights(tmp_path / "copy"), weights(tiny_hf(family))
    assert ours.keys() == theirs.keys()
    assert all(oracle.same_bits(ours[k], theirs[k]) for k in theirs)
    config, before = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "copy", tiny_hf(family)))
    classic = {"rope_theta", "rope_scaling", "rotary_emb_base", "rotary_pct", "partial_rotary_factor", "num_experts"}
    assert {k: v for k, v in config.items() if "dtype" not in k and (k in before or k not in classic)} == {
        k: v for k, v in before.items() if "dtype" not in k
    }
    index = json.loads((tmp_path / "copy" / "model.safetensors.index.json").read_text())
    sizes = [p.stat().st_size for p in (tmp_path / "copy").glob("*.safetensors")]
    assert len(sizes) > 1
    assert index["weight_map"].keys() == theirs.keys()
    assert max(sizes) < 300_000 + 20_000 or max(t.nbytes for t in theirs.values()) > 280_000


def test_each_byte_is_read_once(tmp_path, tiny_hf):
    source = tiny_hf("llama")
    size = (source / "model.safetensors").stat().st_size
    before = IO["bytes"]
    report = surgery.convert(source, tmp_path / "meta", to="meta", topology=Topology(tp=2), verify=False)
    copies = 120 * 4 * (2 * tiny.SIZES["l"] + 1)  # norms are stored by both ranks
    assert size - 2000 <= report.read_bytes <= size + copies + 20_000
    assert IO["bytes"] - before <= size + copies + 60_000


def test_a_small_budget_gives_the_same_files(tmp_path, tiny_hf):
    for name, memory in (("wide", None), ("narrow", 1 << 16)):
        surgery.convert(tiny_hf("llama"), tmp_path / name, to="meta", topology=Topology(tp=4), max_memory=memory)
    for path in sorted((tmp_path / "wide").glob("*.pth")):
        assert path.read_bytes() == (tmp_path / "narrow" / path.name).read_bytes()


@pytest.mark.parametrize(("flag", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_cast_rounds_once_and_both_digests_are_told(flag, kind, tmp_path, tiny_hf):
    report = surgery.convert(tiny_hf("llama"), tmp_path / "cast", to="hf", dtype=flag)
    ours, theirs = weights(tmp_path / "cast"), weights(tiny_hf("llama"))
    assert all(oracle.same_bits(ours[k], theirs[k].to(kind)) for k in theirs)
    same = surgery.convert(tiny_hf("llama"), tmp_path / "same", to="hf")
    assert report.source_digest == same.content_digest
    assert report.content_digest != same.content_digest
    assert json.loads((tmp_path / "cast" / "config.json").read_text())["torch_dtype"] == str(kind).removeprefix(
        "torch."
    )


def test_vocabularies_are_cut_and_padded(tmp_path, tiny_hf):
    source = weights(tiny_hf("llama"))
    for rows in (200, 272):
        report = surgery.convert(tiny_hf("llama"), tmp_path / str(rows), to="hf", vocab_size=rows)
        got = weights(tmp_path / str(rows))["lm_head.weight"]
        assert got.shape[0] == rows
        assert torch.equal(got[:264], source["lm_head.weight"][:rows])
        assert not got[264:].any()
        assert any(f"to {rows}" in n for n in report.notes)
        assert json.loads((tmp_path / str(rows) / "config.json").read_text())["vocab_size"] == rows


def test_provenance(tmp_path, tiny_hf):
    report = surgery.convert(tiny_hf("qwen2"), tmp_path / "out", to="hf", command=["surgery", "convert"])
    record = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert record["content_digest"] == record["source_digest"] == report.content_digest
    assert record["verified"] is True
    assert record["command"] == ["surgery", "convert"]
    assert record["source"]["format"] == "hf"
    spec = open_checkpoint(tmp_path / "out").spec
    assert (
        record["parameters"] == sum(math.prod(t.shape) for t in weights(tmp_path / "out").values()) == spec.parameters()
    )
    for name, size in record["output"]["files"].items():
        assert (tmp_path / "out" / name).stat().st_size == size


def test_nothing_is_overwritten_unasked(tmp_path, tiny_hf):
    surgery.convert(tiny_hf("llama"), tmp_path / "out", to="hf")
    marker = tmp_path / "out" / "mine.txt"
    marker.write_text("keep me")
    with pytest.raises(OutputError, match="exists already"):
        surgery.convert(tiny_hf("llama"), tmp_path / "out", to="hf")
    with pytest.raises(OutputError, match=r"part of no checkpoint.*mine\.txt"):
        surgery.convert(tiny_hf("llama"), tmp_path / "out", to="hf", force=True)
    assert marker.read_text() == "keep me"
    marker.rename(tmp_path / "mine.txt")
    surgery.convert(tiny_hf("llama"), tmp_path / "out", to="hf", force=True)
    assert not marker.exists()


def test_source_and_output_may_not_lie_within_each_other(tmp_path, tiny_hf):
    source = tmp_path / "model"
    os.symlink(tiny_hf("llama"), source)
    for dst in (source, source / "inside"):
        with pytest.raises(OutputError):
            surgery.convert(source, dst, to="hf", force=True)
    assert weights(source)


def test_a_damaged_output_is_not_published(tmp_path, tiny_hf, monkeypatch):
    """Flip a bit of the written file before it is read back."""
    original = conversion._read_back

    def spoil(plan, again, dst, progress):
        path = conversion.data_of(dst) / "model.safetensors"
        with path.open("r+b") as f:
            f.seek(path.stat().st_size // 2)
            byte = f.read(1)
            f.seek(-1, os.SEEK_CUR)
            f.write(bytes([byte[0] ^ 0x10]))
        original(plan, again, dst, progress)

    monkeypatch.setattr(conversion, "_read_back", spoil)
    with pytest.raises(SurgeryError, match="read back differently"):
        surgery.convert(tiny_hf("llama"), tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_memory_stays_within_the_budget(tmp_path):
    """A model several times the budget, in a process of its own."""
    source = tiny.save("llama", tmp_path / "big", "float32", v=60_000, h=240, f=2400)
    assert (source / "model.safetensors").stat().st_size > 160e6
    code = (
        "import json, sys, surgery; from surgery.formats.topology import Topology\n"
        f"paths = {str(source)!r}, {str(tmp_path / 'out')!r}\n"
        "r = surgery.convert(*paths, to='meta', topology=Topology(tp=2), max_memory=32 << 20)\n"
        "print(r.peak_memory, r.bytes)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, size = map(int, done.stdout.split())
    assert size > 160e6
    assert peak < 64 << 20


@pytest.mark.parametrize("name", ["", "no/such/place", "config.json"])
def test_no_checkpoint_is_a_clear_error(name, tmp_path, tiny_hf):
    path = tiny_hf("llama") / name if name == "config.json" else tmp_path / name
    with pytest.raises(FileError):
        surgery.convert(path, tmp_path / "out", to="hf")


def test_unknown_formats_are_told(tmp_path, tiny_hf):
    with pytest.raises(UsageError, match="there is no format 'gguf'"):
        surgery.convert(tiny_hf("llama"), tmp_path / "out", to="gguf")
    with pytest.raises(UsageError, match="there is no format 'x'"):
        surgery.open_checkpoint(tiny_hf("llama"), format="x")


def test_parts_read_only_what_is_asked(tiny_hf):
    part = surgery.open_checkpoint(tiny_hf("llama")).parts["layers.3.mlp.up"]
    before = IO["bytes"]
    rows = part[10:14]
    assert IO["bytes"] - before == rows.nbytes == 4 * tiny.SIZES["h"] * 4
    stored = surgery.open_tensors(tiny_hf("llama") / "model.safetensors")["model.layers.3.mlp.up_proj.weight"]
    assert stored.torch_dtype == torch.float32
    assert torch.equal(stored.full()[10:14], rows)


def test_a_missing_tensor_stops_before_anything_is_written(tmp_path, tiny_hf):
    from safetensors.torch import save_file

    folder = tmp_path / "hole"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_hf("llama") / "config.json").read_bytes())
    stored = weights(tiny_hf("llama"))
    del stored["model.layers.4.self_attn.k_proj.weight"]
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(LayoutError, match=r"model.layers.4.self_attn.k_proj.weight is missing"):
        surgery.convert(folder, tmp_path / "out", to="meta")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hole"]


def test_values_that_a_cast_cannot_hold_are_counted_and_named(tiny_hf, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_hf("llama"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, :3] = torch.tensor([1e10, -1e10, 1e-10])
    tensors["model.norm.weight"][5] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    notes = surgery.convert(source, tmp_path / "half", to="hf", dtype="fp16").notes
    assert "weights too large for float16 became infinite: 2 in all, in layers.1.mlp.up (2)" in notes
    assert "weights NaN or infinite: 1 in all, in final_norm (1)" in notes
    small = [n for n in notes if "became 0" in n]
    assert len(small) == 1
    assert "too small for float16" in small[0]
    report = json.loads((tmp_path / "half" / "surgery.json").read_text())
    assert set(notes) <= set(report["notes"])
    kept = surgery.convert(source, tmp_path / "kept", to="meta").notes
    assert [n for n in kept if "in all" in n] == ["weights NaN or infinite: 1 in all, in final_norm (1)"]
