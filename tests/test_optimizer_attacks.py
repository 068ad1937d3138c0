"""Files of optimizers that lie: every entry of a state in turn is something else, and what reads it answers in words.

Nothing is run, nothing large is made: a state that is accepted in spite of a lie is one that the lie says nothing of.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import surgery
from surgery.errors import LayoutError, SurgeryError
from surgery.formats.topology import Topology
from tests.test_optimizer import FLAT, GOLDEN, MODEL, RANK, copied, opened, trees, trees_without_deepspeed, values

Keys = tuple[Any, ...]
SAMPLE = 10  # lies of each kind of file in the tests by default


class Marker:
    """What a pickle runs when something executes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def lies(folder: Path) -> dict[str, Any]:
    """What an entry says instead."""
    return {
        "nothing": None, "negative": -1, "enormous": 1 << 62, "beyond": 1 << 200, "nan": math.nan, "inf": math.inf,
        "fraction": 0.5, "true": True, "text": "x" * 5000, "bytes": b"\xff" * 50, "list": [], "dict": {},
        "deep": [[[[[[[[[[]]]]]]]]]], "many": list(range(20_000)), "tuple": (0.9, 0.95, 0.99),
        "self": Marker(folder / "run"),
        "scalar": torch.tensor(7.0), "nan scalar": torch.tensor(math.nan), "flat": torch.zeros(3),
        "empty": torch.zeros(0),
        "whole": torch.zeros(4, dtype=torch.int64), "complex": torch.zeros(2, dtype=torch.complex64),
        "half": torch.zeros(7).half(),
        "nans": torch.full((5,), math.nan), "expanded": torch.zeros(1).expand(1000), "cube": torch.zeros(2, 0, 3),
    }  # fmt: skip


def places(node: Any, at: Keys = ()) -> Iterator[Keys]:
    """The path of every entry, and of what holds others."""
    if at:
        yield at
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from places(value, (*at, key))


def changed(node: Any, at: Keys, value: Any) -> Any:
    """A tree with one entry changed, or (value is ...) left out."""
    if not at:
        return value
    copy = dict(node) if isinstance(node, dict) else list(node)
    if value is ... and len(at) == 1:
        del copy[at[0]]
    else:
        copy[at[0]] = changed(copy[at[0]], at[1:], value)
    return copy


# --------------------------------------------------- a folder of each kind, its tree, and how that is written again


def _torch(folder: Path, name: str, inside: Keys = ()) -> tuple[Any, Callable[[Any], None]]:
    whole = trees(folder / name)
    tree = whole
    for key in inside:
        tree = tree[key]
    return tree, lambda new: torch.save(changed(whole, inside, new), folder / name)


def _trainer(folder: Path) -> tuple[Any, Callable[[Any], None]]:
    return _torch(copied("hf-llama", folder), "optimizer.pt")


def _numbered(folder: Path) -> tuple[Any, Callable[[Any], None]]:
    surgery.convert(GOLDEN / "megatron-plain", folder, to="megatron", optimizer=True)
    return _torch(folder, MODEL, ("optimizer",))


def _flat(folder: Path) -> tuple[Any, Callable[[Any], None]]:
    return _torch(copied("megatron-flat", folder), FLAT)


def _zero(folder: Path) -> tuple[Any, Callable[[Any], None]]:
    path = copied("neox-zero1", folder) / RANK.format(1)
    return trees_without_deepspeed(path), lambda new: torch.save(new, path)


def _olmo(folder: Path) -> tuple[Any, Callable[[Any], None]]:
    surgery.convert(GOLDEN / "olmo-core", folder, to="olmo", optimizer=True)
    return _torch(folder, "optim.pt")


def _universal(folder: Path) -> tuple[Any, Callable[[Any], None]]:
    surgery.convert(GOLDEN / "neox-zero1", folder, to="neox", optimizer=True, options={"release": "2024-11"},
                    topology=Topology(pp=0))  # fmt: skip
    zero = next(folder.rglob("zero"))
    names = ("optimizer_state.pt", *(f"sequential.2.mlp.linear2.weight/{x}.pt" for x in ("fp32", "exp_avg", "step")))

    def put(new: Any) -> None:
        for name, tree in new.items():
            torch.save(tree, zero / name)

    return {name: trees(zero / name) for name in names}, put


def _named(folder: Path) -> tuple[Any, Callable[[Any], None]]:
    surgery.convert(GOLDEN / "hf-llama", folder, to="hf", optimizer=True, options={"optimizer": "fsdp"})
    home = folder / "optimizer_0"
    dcp.format_utils.dcp_to_torch_save(home, folder.parent / "all.pt")

    def put(new: Any) -> None:
        for file in (*home.glob("*.distcp"), home / ".metadata"):
            file.unlink(missing_ok=True)
        dcp.save({"optimizer": new} if isinstance(new, dict) else {"x": new},
                 storage_writer=dcp.FileSystemWriter(home), no_dist=True)  # fmt: skip

    return torch.load(folder.parent / "all.pt", weights_only=False)["optimizer"], put


KINDS = {"trainer": _trainer, "numbered": _numbered, "flat": _flat, "zero": _zero, "olmo": _olmo,
         "universal": _universal, "named": _named}  # fmt: skip


def answer(folder: Path, case: str) -> str:
    """What is said of a folder's state; "" if it is taken.  Anything but a SurgeryError goes on."""
    try:
        found = opened(folder, case)
        if found.optimizer:
            values(found)
    except SurgeryError as error:
        return str(error)
    return ""


def tried(kind: str, folder: Path, count: int) -> None:
    """A sample of all entries and lies."""
    tree, put = KINDS[kind](folder / "m")
    said = {**lies(folder), "left out": ...}
    pairs = [(at, lie) for at in places(tree) for lie in said]
    refused = 0
    for at, lie in random.Random(kind).sample(pairs, min(count, len(pairs))):
        try:
            put(changed(tree, at, said[lie]))
        except (TypeError, ValueError, AttributeError, RuntimeError):  # torch itself does not write it
            continue
        text = answer(folder / "m", "neox-zero1" if kind == "zero" else "")
        assert text.isascii() and len(text) < 2000, (at, lie, text)
        refused += bool(text)
    assert refused
    assert not (folder / "run").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_lies_is_answered_in_words(kind, tmp_path):
    tried(kind, tmp_path, SAMPLE)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_many_lies_are_answered_in_words(kind, tmp_path):
    tried(kind, tmp_path, 600)


def test_settings_that_no_group_says_are_told(tmp_path):
    """A state whose groups are gone is read, but what is written in their place is said."""
    tree, put = _named(tmp_path / "m")
    put({**tree, "param_groups": []})
    found = opened(tmp_path / "m").optimizer
    assert any("do not say the settings" in note and "attn.q" in note for note in found.notes)
    assert {group.eps for group in found.groups.values()} == {1e-8}


@pytest.mark.parametrize("number", [[], "0", 1.5, None, -1, 99])
def test_numbers_of_parameters_that_are_none_are_refused(number, tmp_path):
    tree, put = _numbered(tmp_path / "m")
    put(changed(tree, ("optimizer", "param_groups", 1, "params", 2), number))
    with pytest.raises(SurgeryError, match="has no state of"):
        opened(tmp_path / "m")


def test_the_state_of_another_optimizer_is_named(tmp_path):
    """OLMo's LionW keeps exp_avg alone, and counts nothing."""
    tree, put = _olmo(tmp_path / "m")
    put({**tree, "state": {name: {"exp_avg": fields["exp_avg"]} for name, fields in tree["state"].items()}})
    with pytest.raises(LayoutError, match="has no exp_avg_sq among exp_avg") as error:
        opened(tmp_path / "m")
    assert "that of other optimizers is not" in str(error.value)
