"""A bit that flips between writing and publishing is found, wherever in the output it lies."""

import pytest
import torch

import surgery
from surgery.containers.output import OutputFile, Region, copied_file, text_file
from surgery.containers.safetensors import safetensors_file
from surgery.containers.torch_writer import torch_file
from surgery.conversion import convert as conversion
from surgery.errors import FileError, SurgeryError
from surgery.tensors.fingerprint import Ledger
from surgery.tensors.lazy import Concat, Fill, Lazy, Map, lengths
from surgery.writing.readback import Spoilt, unproven
from surgery.writing.sink import Sink
from surgery.writing.stream import write


class Numbers(Lazy):
    """Bytes 1, 2, 3, ... of some shape."""

    def __init__(self, *shape):
        self.shape, self.dtype = shape, "uint8"

    def read(self, box):
        rows = torch.arange(1, 1 + torch.Size(self.shape).numel()).to(torch.uint8)
        return rows.reshape(self.shape)[tuple(slice(a, b) for a, b in box)].reshape(lengths(box))


def hidden(dst):
    return dst.with_name(f".{dst.name}.surgery-partial")


def flip(path, at):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << at % 8]))


def plan(ledger, tmp_path):
    """Every kind of bytes: weights, padding rows, gaps, a replica, a computed tensor, a copied file, an archive."""
    w, v, u = (ledger.tap(name, Numbers(*shape)) for name, shape in {"w": (3, 4), "v": (2, 4), "u": (5,)}.items())
    (tmp_path / "README.md").write_text("read me")
    return [
        safetensors_file("a.safetensors", {"w": w, "padded": Concat([v, Fill((2, 4), "uint8")], 0)}),
        OutputFile("gaps", 24, b"head", (Region("u", u, 8),)),
        torch_file("b/c.pt", {"w": w, "half": Map(lambda t: t // 2, [Numbers(7)])}, copies=frozenset({"w"})),
        text_file("config.json", b'{"a": 1}'),
        copied_file("README.md", tmp_path / "README.md"),
    ]


def record(done):
    return [text_file("surgery.json", b'{"parts": 3}')]


def positions(tmp_path):
    """(file, byte) all over an output of `plan`, with the first and the last byte of every file."""
    ledger = Ledger()
    write(plan(ledger, tmp_path), tmp_path / "whole", max_memory=1, job={}, ledger=ledger, closing=record)
    for path in sorted(p for p in (tmp_path / "whole").rglob("*") if p.is_file()):
        size = path.stat().st_size
        for at in {*range(0, size, 5 if size < 64 else 23), size - 1}:
            yield path.relative_to(tmp_path / "whole"), at


def test_every_byte_that_no_digest_proves_is_compared(tmp_path, monkeypatch):
    dst, target, small = tmp_path / "out", [], Sink.write_small

    def spoil(sink, file):  # the record is written last
        small(sink, file)
        flip(hidden(dst) / "data" / target[0], target[1])

    places = list(positions(tmp_path))
    assert len(places) > 70
    monkeypatch.setattr(Sink, "write_small", spoil)
    for name, at in places:
        if name.name == "gaps" and 8 <= at < 13:  # the only bytes that are a part's and nothing else
            continue
        target[:] = name, at
        ledger = Ledger()
        with pytest.raises(Spoilt, match=name.name):
            write(plan(ledger, tmp_path), dst, max_memory=1, job={}, ledger=ledger, closing=record, durable=False)
        assert not hidden(dst).exists() and not dst.exists()


def test_which_regions_the_digests_prove(tmp_path):
    ledger = Ledger()
    kept = unproven(plan(ledger, tmp_path), ledger)
    assert kept == {"a.safetensors": {0, 1}, "gaps": set(), "b/c.pt": {0, 1}, "config.json": set(), "README.md": set()}
    assert unproven(plan(ledger, tmp_path), None)["gaps"] == {0}


def test_what_an_earlier_run_had_finished_is_compared_too(tmp_path):
    """The CRC-32s of its regions are in the journal."""
    dst, ledger = tmp_path / "out", Ledger()

    def fail(done):
        raise FileError("stopped")

    files = plan(ledger, tmp_path)
    with pytest.raises(FileError, match="stopped"):
        write(files, dst, max_memory=1, job={}, ledger=ledger, closing=fail)
    size = (hidden(dst) / "data/a.safetensors").stat().st_size
    flip(hidden(dst) / "data/a.safetensors", size - 1)  # in a row of zeros
    ledger = Ledger()
    with pytest.raises(Spoilt, match=r"1 files read back differently from what was written: a\.safetensors"):
        write(plan(ledger, tmp_path), dst, max_memory=1, job={}, ledger=ledger)
    ledger = Ledger()
    assert write(plan(ledger, tmp_path), dst, max_memory=1, job={}, ledger=ledger).resumed_bytes == 0


def test_without_a_ledger_every_byte_is_compared(tmp_path):
    files = [OutputFile("x", 5, regions=(Region("u", Numbers(5), 0),))]
    for at in range(5):
        with pytest.raises(Spoilt):
            write(files, tmp_path / "out", max_memory=1, job={}, closing=lambda done, at=at: flipped(tmp_path, at))
    write(files, tmp_path / "out", max_memory=1, job={}, closing=lambda done: flipped(tmp_path, 2), compare=False)


def flipped(tmp_path, at):
    flip(hidden(tmp_path / "out") / "data/x", at)
    return []


TARGETS = {
    "hf": "llama", "meta": "llama", "megatron": "llama", "megatron-dist": "qwen3", "neox": "gpt_neox",
    "olmo": "olmo2", "olmo-core": "olmo2",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("to", TARGETS)
def test_a_conversion_finds_a_flipped_bit_in_any_of_its_files(to, tiny_hf, tmp_path, monkeypatch):
    """In the middle of every text, in the header of safetensors, at both ends of archives."""
    source, dst = tiny_hf(TARGETS[to]), tmp_path / "out"
    surgery.convert(source, tmp_path / "whole", to=to, sync=False)
    real = conversion._read_back

    target = []

    def spoil(*args):
        real(*args)
        flip(hidden(dst) / "data" / target[0], target[1])

    monkeypatch.setattr(conversion, "_read_back", spoil)
    for path in sorted(p for p in (tmp_path / "whole").rglob("*") if p.is_file() and p.name != "surgery.json"):
        name, size = path.relative_to(tmp_path / "whole"), path.stat().st_size
        archive = path.suffix in (".pt", ".pth", ".distcp")
        for at in (0, size - 1) if archive else (8,) if path.suffix == ".safetensors" else (size // 2,):
            target[:] = name, at
            with pytest.raises(Spoilt, match=name.name):
                surgery.convert(source, dst, to=to, sync=False)
            assert not dst.exists() and not hidden(dst).exists()


def test_a_config_that_cannot_be_read_back_is_told_from_a_broken_disk(tiny_hf, tmp_path, monkeypatch):
    real = conversion._again

    def spoil(plan, dst):
        flip(hidden(dst) / "data/config.json", 0)
        return real(plan, dst)

    monkeypatch.setattr(conversion, "_again", spoil)
    with pytest.raises(Spoilt, match=r"config\.json"):
        surgery.convert(tiny_hf("llama"), tmp_path / "out", to="hf")
    monkeypatch.setattr(conversion, "_again", real)
    monkeypatch.setattr(conversion, "_read_back", fails)
    with pytest.raises(SurgeryError, match="no reason of the disk"):
        surgery.convert(tiny_hf("llama"), tmp_path / "out", to="hf")
    assert (hidden(tmp_path / "out") / "data/config.json").exists()  # what was written is kept


def fails(*args):
    raise SurgeryError("no reason of the disk")
