"""One place says of each field of Spec what it is called and whether the function depends on it."""

from __future__ import annotations

import dataclasses

import pytest

from surgery.errors import ConfigError
from surgery.model.spec import AXES, FIELDS, PARTS, Rope, Spec
from surgery.model.wording import check_held, in_words
from surgery.tensors.axes import flat

DENSE = Spec("llama", layers=4, width=8, vocab=16, kv_heads=2, group=3, head_dim=4, ffn=12)
SPARSE = DENSE.replace(experts=6, expert_ffn=5, top_k=2)


def test_every_field_is_declared_with_a_label_of_its_own():
    assert list(FIELDS) == [f.name for f in dataclasses.fields(Spec)]
    labels = [field.label for field in FIELDS.values()]
    assert len(set(labels)) == len(labels)


def test_every_axis_of_every_part_is_measured():
    letters = {axis for part in PARTS.values() for axis in flat(part.layout)}
    assert letters <= AXES.keys() | {"two", "half", "u"}


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (DENSE, {"family": "mistral"}),
        (DENSE, {"true_vocab": 9}),
        (DENSE, {"context": 77}),
        (DENSE, {"top_k": 3}),  # no experts
        (DENSE, {"rope_local": Rope(5.0)}),  # no windows
        (DENSE, {"windows": (0, 0, 0, 0)}),
        (DENSE, {"clip_after_norm": True}),  # no clipping
        (SPARSE, {"ffn": 99}),  # no dense layer
        (SPARSE, {"moe_layers": (0, 1, 2, 3)}),
        (DENSE.replace(windows=(5, 0, 5, 0)), {"rope_local": Rope()}),  # the same as the others'
    ],
)
def test_what_no_computation_uses_changes_nothing(base, changes):
    other = base.replace(**changes)
    assert base.differences(other) and base.same_function(other) and other.same_function(base)
    check_held("any format", base, other)


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (SPARSE.replace(moe_layers=(1,)), {"ffn": 99}),
        (SPARSE, {"moe_layers": (0, 1, 2)}),
        (SPARSE, {"router_score": "sigmoid"}),
        (DENSE, {"windows": (0, 3, 0, 0)}),
        (DENSE.replace(rope=Rope(1e4, 1.0, {"type": "dynamic", "factor": 2.0}), context=64), {"context": 128}),
        (DENSE, {"norm_eps": 1e-6}),
        (DENSE, {"tied": True}),
    ],
)
def test_what_is_computed_with_changes_the_function(base, changes):
    other = base.replace(**changes)
    assert base.changes(other).keys() == changes.keys()
    with pytest.raises(ConfigError, match=r"any format cannot hold this llama: .*\(would be: "):
        check_held("any format", base, other)


def test_differences_are_said_in_words():
    gaps = DENSE.changes(DENSE.replace(windows=(7, 7, 0, 9), qk_norm="head", glu=False, rope=None))
    assert in_words(gaps) == (
        "query and key norms: none (would be: over each head); rope: base 10000 (would be: none); "
        "sliding window: none (would be: 7 and 9 in 3 of 4 layers); gated mlp: yes (would be: no)"
    )
    assert FIELDS["moe_layers"].say((0, 2, 3, 4)) == "0, 2 to 4"
    assert FIELDS["rope"].say(Rope(5e5, 0.5, {"type": "yarn", "factor": 4.0})) == (
        "base 500000 on 0.5 of a head, scaled as yarn (factor 4)"
    )


@pytest.mark.parametrize("changes", [{"layers": 0}, {"vocab": -1}, {"head_dim": 5}, {"head_dim": 0},
                                     {"experts": 4, "top_k": 5}, {"attn_experts": 2, "attn_top_k": 3}])  # fmt: skip
def test_senseless_sizes_are_refused(changes):
    with pytest.raises(ConfigError):
        DENSE.replace(**changes)
