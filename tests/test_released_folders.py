"""Folders as trainers and publishers leave them: heads stored alone or parted, layers that predict further tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

import surgery
from surgery.errors import AmbiguousError, LayoutError
from tests import oracle, tiny

IDS = torch.arange(40).reshape(2, 20) * 7 % 60
SMALL = {"l": 2, "v": 64}


def edit(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **keys: object) -> Path:
    """Other tensors besides, other keys of the config."""
    file, config = folder / "model.safetensors", folder / "config.json"
    save_file({**load_file(file), **(tensors or {})}, file, {"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), **keys}))
    return folder


def test_a_tied_model_of_which_only_the_head_is_stored(tmp_path):
    folder = tiny.save("llama_tied", tmp_path / "model", **SMALL)
    model = tiny.model("llama_tied", **SMALL)
    save_model(model, folder / "model.safetensors", {"format": "pt"})
    assert "model.embed_tokens.weight" not in load_file(folder / "model.safetensors")
    found = surgery.open_checkpoint(folder)
    assert torch.equal(found.parts["embed"].full(), model.lm_head.weight)
    assert any("only lm_head.weight is stored" in note for note in found.notes)
    surgery.convert(folder, tmp_path / "out", to="hf")
    assert oracle.gap(oracle.hf_logits(tmp_path / "out", IDS), oracle.hf_logits(folder, IDS)) == 0


def test_a_tied_model_with_a_head_of_its_own_is_read_as_is_said(tmp_path):
    head = torch.randn(64, 120, generator=torch.Generator().manual_seed(1))
    folder = edit(tiny.save("llama_tied", tmp_path / "model", **SMALL), {"lm_head.weight": head})
    with pytest.raises(AmbiguousError, match=r"tie_word_embeddings is true, but lm_head.weight") as caught:
        surgery.convert(folder, tmp_path / "out", to="hf")
    assert caught.value.readings == ({"tied": "no"}, {"tied": "yes"})
    surgery.convert(folder, tmp_path / "no", to="hf", options={"tied": "no"})
    assert oracle.gap(oracle.hf_logits(tmp_path / "no", IDS), oracle.hf_logits(folder, IDS)) == 0  # transformers 5
    report = surgery.convert(folder, tmp_path / "yes", to="hf", options={"tied": "yes"})
    assert "lm_head.weight beside the embedding" in report.dropped
    bare = tiny.save("llama_tied", tmp_path / "bare", **SMALL)
    assert oracle.gap(oracle.hf_logits(tmp_path / "yes", IDS), oracle.hf_logits(bare, IDS)) == 0


def test_a_head_that_differs_in_few_rows_is_found_when_it_is_read(tmp_path):
    folder = tiny.save("llama_tied", tmp_path / "model", **SMALL)
    head = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()
    head[5] = 0
    edit(folder, {"lm_head.weight": head})
    with pytest.raises(LayoutError, match="copy 1 differs") as caught:
        surgery.convert(folder, tmp_path / "out", to="hf")
    assert "-O tied=no" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("family", "keys", "name"),
    [
        ("glm4_moe", {"num_nextn_predict_layers": 1}, "model.layers.2.eh_proj.weight"),
        ("ernie4_5_moe", {"num_nextn_predict_layers": 1}, "model.mtp_block.0.mlp.up_proj.weight"),
    ],
)
def test_layers_that_predict_further_tokens_are_left_out(family, keys, name, tmp_path):
    sizes = (
        {"l": 2, "v": 64, "moe_layer_end_index": 1}
        if family == "ernie4_5_moe"
        else {**SMALL, "first_k_dense_replace": 1}
    )
    folder = edit(tiny.save(family, tmp_path / "model", **sizes), {name: torch.ones(3, 5)}, **keys)
    report = surgery.convert(folder, tmp_path / "out", to="hf")
    assert [n for n, why in report.dropped.items() if "predicts further tokens" in why] == [name]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert oracle.gap(oracle.hf_logits(tmp_path / "out", IDS), oracle.hf_logits(folder, IDS)) == 0
    assert surgery.verify(folder, tmp_path / "out").same
    with pytest.raises(LayoutError, match="no place"):  # unless the config says that there are such layers
        surgery.open_checkpoint(edit(folder, {"model.layers.2.x.weight": torch.ones(2)}, num_nextn_predict_layers=0))
