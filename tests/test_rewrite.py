"""A checkpoint rewritten in its own format: the same tensors in files that stock loaders take with weights_only."""

from __future__ import annotations

import argparse
import pickle
import pickletools
from pathlib import Path

import pytest
import torch
from torch.serialization import safe_globals

from surgery.conversion.convert import convert
from surgery.formats.registry import open_checkpoint
from tests import oracle

# checkpoint -> options of reading; whether upstream's own files are refused by torch's default
CASES = {
    "neox/llama_gqa_seq_bf16_zero1_tp2": ({"release": "2024-11"}, True),
    "neox/pythia_pp1_tp2_splitbias": ({}, True),
    "megatron/a_llama_legacy_tp2pp2": ({}, True),
    "megatron/c_llama_torchdist_tp1_te23": ({}, True),
    "olmo/olmo2": ({}, False),
}


def rewritten(name: str, out: Path) -> tuple[Path, Path]:
    source = oracle.GOLDEN / name / "checkpoint"
    opened = open_checkpoint(source, options=CASES[name][0])
    report = convert(source, out, to=opened.format, topology=opened.topology, options=CASES[name][0])
    assert report.verified
    return source, out


def refusal(path: Path) -> str:
    """What torch says about a file by default; "" if it reads it."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", CASES)
def test_stock_loaders_take_what_is_rewritten(name, tmp_path):
    source, out = rewritten(name, tmp_path / "out")
    theirs = [path for path in source.rglob("*.pt") if refusal(path)]
    assert bool(theirs) == CASES[name][1]
    for path in out.rglob("*.pt"):
        said = refusal(path)
        if "argparse.Namespace" in said:  # Megatron asks `args` for attributes: nothing else will do
            assert name.startswith("megatron/")
            with safe_globals([argparse.Namespace]):
                said = refusal(path)
                state = torch.load(path, map_location="cpu", weights_only=True)
            plain = (int, float, str, bool, list, tuple, type(None))
            assert all(isinstance(value, plain) for value in vars(state["args"]).values())
        assert not said, path


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("neox/")])
def test_a_rewritten_neox_checkpoint_needs_no_permission(name, tmp_path):
    _, out = rewritten(name, tmp_path / "out")
    assert not [said for path in out.rglob("*.pt") if (said := refusal(path))]


def test_a_rewritten_dist_checkpoint_names_torchs_records_only(tmp_path):
    """torch unpickles .metadata without restrictions: there is nothing in it that could run."""
    import torch.distributed.checkpoint as dcp

    source, out = rewritten("megatron/c_llama_torchdist_tp1_te23", tmp_path / "out")

    def names(folder: Path) -> set[str]:
        data = (folder / "iter_0000001/.metadata").read_bytes()
        return {str(arg) for op, arg, _ in pickletools.genops(data) if op.name == "GLOBAL"}

    assert names(out)
    assert all(name.split(" ")[0].startswith("torch") for name in names(out)), names(out)
    stored = dcp.FileSystemReader(out / "iter_0000001").read_metadata().state_dict_metadata
    sizes = {k: v for k, v in stored.items() if "_extra_state" not in k}
    state = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in sizes.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(out / "iter_0000001"), no_dist=True)
    want = {k: p.full() for k, p in open_checkpoint(source).parts.items()}
    assert oracle.same_bits(state["decoder.final_layernorm.weight"], want["final_norm"])
    assert oracle.same_bits(state["embedding.word_embeddings.weight"], want["embed"])
