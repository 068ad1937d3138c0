"""What goes along of an optimizer's state: values that are no numbers, and settings that differ among parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import surgery
from surgery.errors import LayoutError
from surgery.formats.topology import Topology
from tests.test_optimizer import GOLDEN, MODEL, copied, equal, opened, trees, values


def test_a_state_of_no_numbers_is_counted_and_named(tmp_path):
    """As weights are, whose note it leaves alone; a master's NaN is its weight's as well."""
    tree = trees(copied("hf-llama", tmp_path / "hf") / "optimizer.pt")
    tree["state"][0]["exp_avg"][0, :2] = torch.nan
    tree["state"][0]["exp_avg_sq"][1, 0] = torch.inf
    torch.save(tree, tmp_path / "hf" / "optimizer.pt")
    done = surgery.convert(tmp_path / "hf", tmp_path / "m", to="megatron", optimizer=True, dtype="bf16",
                           options={"spec": "local", "iteration": "2"})  # fmt: skip
    named = "NaN or infinite in the optimizer's state: {} in all, in exp_avg of embed (2), exp_avg_sq of embed (1)"
    assert [note for note in done.notes if "in all" in note] == [named.format(3)]
    tree = torch.load(tmp_path / "m" / MODEL, weights_only=False)
    tree["model"]["decoder.final_layernorm.weight"][3] = torch.nan
    tree["optimizer"]["fp32_from_fp16_params"][1][-1][3] = torch.nan
    torch.save(tree, tmp_path / "m" / MODEL)
    done = surgery.convert(tmp_path / "m", tmp_path / "d", to="megatron-dist", optimizer=True)
    assert [note for note in done.notes if "in all" in note] == [
        "weights NaN or infinite: 1 in all, in final_norm (1)", named.format(4) + ", master of final_norm (1)",
    ]  # fmt: skip


@pytest.mark.parametrize("optimizer", ["plain", "distributed"])
def test_weights_in_fp32_among_others_are_their_own_masters(optimizer, tmp_path):
    source = copied("hf-llama", tmp_path / "hf")
    weights = load_file(source / "model.safetensors")
    mixed = {n: t if "norm" in n else t.bfloat16() for n, t in weights.items()}
    save_file(mixed, source / "model.safetensors", metadata={"format": "pt"})
    options = {"optimizer": optimizer}
    surgery.convert(source, tmp_path / "m", to="megatron", optimizer=True, options=options)
    assert equal(values(opened(tmp_path / "m")), values(opened(source)))
    if optimizer == "distributed":
        wide = {n: t.double() for n, t in weights.items()}
        save_file(wide, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(LayoutError, match="trains no weights in float64"):
            surgery.convert(source, tmp_path / "w", to="megatron", optimizer=True, options=options)


def grouped(folder: Path, groups: dict[str, float]) -> Path:
    """A state by name whose parameters decay by the first of these beginnings of names that theirs has."""
    surgery.convert(GOLDEN / "hf-llama", folder, to="hf", optimizer=True, options={"optimizer": "fsdp"})
    dcp_to_torch_save(folder / "optimizer_0", folder / "all.pt")
    tree = trees(folder / "all.pt")["optimizer"]
    owner = {name: next(start for start in groups if name.startswith(start)) for name in tree["state"]}
    tree["param_groups"] = [
        {**tree["param_groups"][0], "weight_decay": decay, "params": [n for n in owner if owner[n] == start]}
        for start, decay in groups.items()
    ]
    torch.save(tree, folder / "optimizer.bin")
    for path in (*(folder / "optimizer_0").iterdir(), folder / "all.pt"):
        path.unlink()
    (folder / "optimizer_0").rmdir()
    return folder


TWO_GROUPS = (
    ("megatron", {}),
    ("megatron", {"optimizer": "distributed"}),
    ("megatron-dist", {}),
    ("hf", {}),
    ("neox", {}),
)


def test_three_weight_decays_are_carried_where_a_format_has_a_place_for_each(tmp_path):
    """OLMo-core says the settings of every parameter; the others have two groups."""
    source = grouped(tmp_path / "hf", {"model.embed_tokens": 0.01, "model.norm": 0.0, "": 0.1})
    want = {name: group.weight_decay for name, group in opened(source).optimizer.groups.items()}
    assert want["embed"] == 0.01 and want["final_norm"] == 0.0 and want["layers.{l}.attn_norm"] == 0.1
    surgery.convert(source, tmp_path / "core", to="olmo-core", optimizer=True)
    assert {name: g.weight_decay for name, g in opened(tmp_path / "core").optimizer.groups.items()} == want
    for i, (to, options) in enumerate(TWO_GROUPS):
        topology = Topology(pp=0) if to == "neox" else Topology()
        done = surgery.convert(source, tmp_path / f"{i}", to=to, optimizer=True, options=options, topology=topology)
        (told,) = (note for note in done.notes if "did otherwise before" in note)
        assert "embed" in told and ("attn_norm" in told or "input_layernorm" in told) and "up" not in told
    with pytest.raises(LayoutError, match="two groups, decayed or not"):
        surgery.convert(source, tmp_path / "olmo", to="olmo", optimizer=True)


def test_layers_that_differ_in_their_settings_are_named(tmp_path):
    source = grouped(tmp_path / "hf", {"model.layers.0.self_attn": 0.2, "model.norm": 0.0, "": 0.1})
    (note,) = (note for note in opened(source).optimizer.notes if "some layers" in note)
    assert all(f"layers.{{l}}.attn.{part}" in note for part in "qkvo") and "mlp" not in note
    assert not any("some layers" in note for note in opened(GOLDEN / "hf-llama").optimizer.notes)
