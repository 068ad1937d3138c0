"""What mergekit's YAML may look like: keys that nothing uses, aliases, slices of no layers, other kinds of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.containers.text import read_yaml
from surgery.errors import SurgeryError
from surgery.merging.recipe import parse_recipe, read_recipe
from tests import tiny

AB = [{"model": "a", "parameters": {"weight": 0.6}}, {"model": "b", "parameters": {"weight": 0.4}}]


@pytest.mark.parametrize(
    ("recipe", "notes"),
    [
        ({"merge_method": "slerp", "base_model": "a", "models": AB, "parameters": {"t": 0.3}},
         ["models[0].parameters: weight", "models[1].parameters: weight"]),
        ({"merge_method": "linear", "models": AB, "parameters": {"int8_mask": True, "embed_slerp": True}},
         ["parameters: int8_mask", "parameters: embed_slerp"]),
        ({"merge_method": "linear", "models": AB, "name": "mine"}, ["name"]),
        ({"merge_method": "della", "base_model": "c",
          "models": [{"model": "a", "parameters": {"density": 1, "weight": 1, "lambda": 0.9}}]},
         ["models[0].parameters: lambda"]),
        ({"merge_method": "arcee_fusion", "base_model": "c", "models": [{"model": "a"}],
          "parameters": {"normalize": True, "rescale": False}}, ["parameters: normalize", "parameters: rescale"]),
    ],
)  # fmt: skip
def test_keys_of_other_methods_are_noted(recipe: dict[str, Any], notes: list[str]) -> None:
    assert list(parse_recipe(recipe).notes) == [f"{n} has no effect here, as in mergekit" for n in notes]


@pytest.mark.parametrize(
    ("recipe", "words", "hint"),
    [
        ({"merge_method": "linear", "models": [{"model": "a", "parameters": {"wieght": 1}}]}, "'wieght'", "weight"),
        ({"merge_method": "slerp", "base_model": "a", "models": AB, "parameters": {"T": 1}}, "'T' is no key", "known"),
        ({"merge_method": "linear", "models": AB, "normalize": True}, "normalize", "under parameters"),
        ({"base_model": "a", "gate_mode": "hidden", "experts": []}, "a mixture of experts", "--strategy mix"),
    ],
)
def test_misspelt_and_misplaced_keys_are_errors(recipe: dict[str, Any], words: str, hint: str) -> None:
    with pytest.raises(SurgeryError, match=words) as refused:
        parse_recipe(recipe)
    assert hint in refused.value.hint


def test_aliases_and_merge_keys(tmp_path: Path) -> None:
    (tmp_path / "merge.yml").write_text("""
merge_method: ties
base_model: c
models:
- model: a
  parameters: &p {weight: 0.5, density: 0.75}
- model: b
  parameters: {<<: *p, weight: 0.25}
- model: d
  parameters: *p
- model: e
  parameters: {<<: [{weight: 0.1}, *p]}
""")
    given = [s.settings for s in read_recipe(tmp_path / "merge.yml").slices[0].sources]
    assert [(s.get("weight"), s.get("density")) for s in given] == [
        (0.5, 0.75), (0.25, 0.75), (0.5, 0.75), (0.1, 0.75), (None, None)]  # fmt: skip


def bomb() -> str:
    lines = [f"{c}: &{c} [{', '.join(['*' + p] * 10)}]\n" for p, c in zip("abcdef", "bcdefg", strict=True)]
    return "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (bomb(), "aliases written out"),
        ("a: &a {b: *a}", "within what it names"),
        ("a: {<<: 3}", "takes a mapping"),
        ("a: 1\n---\na: 2", "several documents"),
        ("a: *nobody", "not valid YAML"),
        ("a: {b: 1, b: 2}", "appears twice"),
    ],
)
def test_aliases_that_go_wrong(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.yml").write_text(text)
    with pytest.raises(SurgeryError, match=words) as caught:
        read_yaml(tmp_path / "x.yml", aliases=True)
    assert ("a file of each document" in str(caught.value.hint)) == ("---" in text)


def test_a_last_slice_of_no_layers_gives_the_head(tmp_path: Path) -> None:
    a, b = (tiny.save("llama", tmp_path / n) for n in "ab")
    first = load_file(a / "model.safetensors")
    save_file({n: t * 2 for n, t in first.items()}, b / "model.safetensors", {"format": "pt"})
    slices = [{"sources": [{"model": str(m), "layer_range": span}]} for m, span in ((a, [0, 6]), (b, [6, 6]))]
    surgery.soup({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    for name in out:
        theirs = name in ("lm_head.weight", "model.norm.weight")
        assert torch.equal(out[name], first[name] * (2 if theirs else 1)), name
    with pytest.raises(SurgeryError, match="no slice has a layer"):
        surgery.soup({"merge_method": "passthrough", "slices": slices[1:]}, tmp_path / "none")
