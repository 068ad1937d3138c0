"""Whole checkpoints with payloads in them, with files missing or spoilt, and with random damage.

What the real programs wrote is the seed.  A payload beside good weights stays inert and is listed; whatever is broken
ends in a SurgeryError or is read as it was; nothing else is ever raised.  SURGERY_FUZZ_SECONDS lengthens the search.
"""

from __future__ import annotations

import os
import pickle
import random
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import torch

from surgery.conversion.convert import convert
from surgery.errors import SurgeryError
from surgery.formats.registry import open_checkpoint
from test_fuzz import damage
from tests import oracle

SECONDS = float(os.environ.get("SURGERY_FUZZ_SECONDS", "1"))
SEEDS = {
    "neox/llama_gqa_seq_bf16_zero1_tp2": {"release": "2024-11"},  # DeepSpeed's rank files
    "neox/pythia_pp1_tp2_splitbias": {},  # DeepSpeed's layer files
    "megatron/a_llama_legacy_tp2pp2": {},
    "megatron/d_moemix_legacy_tp1": {},
    "megatron/c_llama_torchdist_tp1_te23": {},  # common.pt, .metadata, .distcp
    "olmo/olmo2": {},
    "olmo/olmo2-safetensors": {},  # pickles in the names of tensors
    "olmo/olmo2-local": {},
    "olmo/olmo2-olmo_core": {},
    "olmo/olmo2-torch_legacy": {},
    "olmo/olmo2-torch_new": {},
    "olmo_core/olmo2-fsdp": {},
}
SUFFIXES = (".pt", ".metadata", ".distcp", ".safetensors", ".yml", ".yaml", ".json", "latest", ".txt")


def copied(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(oracle.GOLDEN / name / "checkpoint", folder / "checkpoint"))


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))


def values(folder: Path, options: dict[str, str]) -> dict[str, torch.Tensor]:
    return {name: part.full() for name, part in open_checkpoint(folder, options=options).parts.items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(oracle.same_bits(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------------------- payloads


def payload(marker: Path) -> bytes:
    """Opcodes that touch the marker, and then leave the stack as it was."""
    return b"cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR0"


def poison(path: Path, marker: Path) -> bool:
    """Put the payload at the start of a file's pickle; False if it holds none."""
    if path.name == ".metadata":
        data = path.read_bytes()
        path.write_bytes(data[:2] + payload(marker) + data[2:])
        return True
    if not zipfile.is_zipfile(path) or path.suffix != ".pt":
        return False
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members:
            archive.writestr(name, data[:2] + payload(marker) + data[2:] if name.endswith("data.pkl") else data)
    return True


def test_the_payload_is_live(tmp_path):
    pickle.loads(b"\x80\2" + payload(tmp_path / "marker") + b"N.")
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", [name for name in SEEDS if "safetensors" not in name])
def test_payloads_beside_good_weights_are_inert(name, tmp_path):
    want, options = values(oracle.GOLDEN / name / "checkpoint", SEEDS[name]), SEEDS[name]
    folder, marker = copied(name, tmp_path), tmp_path / "marker"
    poisoned = [path for path in files_of(folder) if poison(path, marker)]
    opened = open_checkpoint(folder, options=options)
    assert equal({k: p.full() for k, p in opened.parts.items()}, want)
    assert poisoned
    read = [path for path in poisoned if path in opened.files or path.name == ".metadata"]
    assert ("posix.system" in opened.globals) == bool(read)
    convert(folder, tmp_path / "clean", to=opened.format, options=options, topology=opened.topology)
    assert equal(values(tmp_path / "clean", {}), want)
    assert "posix.system" not in open_checkpoint(tmp_path / "clean").globals
    assert not marker.exists()


# ------------------------------------------------------------------------------------------------ missing and spoilt


def spoil(path: Path) -> list[bytes | None]:
    """What a file may become: nothing, empty, a part of itself, rubbish; None deletes it."""
    data = path.read_bytes()
    return [None, b"", data[: len(data) // 2], data[1:], b"\0" * len(data), b"<html>404</html>", b"PK\3\4" + data]


@pytest.mark.parametrize("name", SEEDS)
def test_files_missing_or_spoilt(name, tmp_path):
    want, options = values(oracle.GOLDEN / name / "checkpoint", SEEDS[name]), SEEDS[name]
    folder, refused, tried, said = copied(name, tmp_path), 0, 0, []
    for path in files_of(folder)[:12]:
        data = path.read_bytes()
        for other in spoil(path):
            path.unlink()
            if other is not None:
                path.write_bytes(other)
            tried += 1
            try:
                assert equal(values(folder, options), want), (path, other and other[:20])
            except SurgeryError as error:
                refused += 1
                said.append(str(error))
            path.write_bytes(data)
    assert refused > tried // 4  # the others are files that are not needed
    assert all(text.isascii() and len(text) < 1500 for text in said), said
    assert equal(values(folder, options), want)


# ------------------------------------------------------------------------------------------------ random damage


@pytest.mark.parametrize("name", SEEDS)
def test_random_damage(name, tmp_path):
    folder, options, random_ = copied(name, tmp_path), SEEDS[name], random.Random(name)
    files = files_of(folder)
    seeds = [path.read_bytes()[:4000] for path in files]
    end, done, said = time.monotonic() + SECONDS, 0, []
    while time.monotonic() < end:
        path = random_.choice(files)
        data = path.read_bytes()
        spoilt = flipped(random_, data) if random_.random() < 0.5 else damage(random_, data, seeds)
        path.write_bytes(spoilt)
        done += 1
        try:
            values(folder, options)
        except SurgeryError as error:
            said.append(str(error))
        except Exception as error:
            kept = tmp_path.parent / f"{path.name}.damaged"
            kept.write_bytes(spoilt)
            raise AssertionError(f"{type(error).__name__} instead of a SurgeryError: {path}, kept as {kept}") from error
        finally:
            path.write_bytes(data)
    assert done > 3
    assert said
    assert all(text.isascii() for text in said), said


def flipped(random_: random.Random, data: bytes) -> bytes:
    """One byte changed, more often near an end of the file, where headers and directories are."""
    out = bytearray(data or b"\0")
    reach = min(len(out), random_.choice((64, 1000, len(out))))
    at = random_.randrange(reach)
    out[at if random_.random() < 0.5 else -1 - at] ^= random_.randrange(1, 256)
    return bytes(out)
