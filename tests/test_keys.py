"""Keys of a config: what is asked, what is missing, what is unknown; and tables of keys in both directions."""

from __future__ import annotations

import pytest

from surgery.errors import ConfigError
from surgery.formats.keys import NOT, Fixed, Key, Keys, Pair, read, write
from surgery.model.spec import Rope, Spec

SPEC = Spec("llama", layers=4, width=8, vocab=16, kv_heads=2, group=3, head_dim=4, ffn=12, norm_eps=1e-6)
TABLE = (
    Key("n_layers", "layers"),
    Key("eps", "norm_eps", 1e-5),
    Key("untied", "tied", False, NOT),
    Key("norm", "norm", "LN", {"LN": "layer", "RMS": "rms"}),
    Key("clip", "clip_qkv", None),
    Fixed("alibi", False, ()),
    Fixed("scale", 1.0, means="another scale"),
    Pair(lambda keys: {"rope": Rope(keys.real("base"))}, lambda spec: {"base": spec.rope.base}),
)
CONFIG = {
    "n_layers": 4,
    "eps": 1e-6,
    "untied": True,
    "norm": "RMS",
    "clip": 2.5,
    "alibi": False,
    "scale": 1.0,
    "base": 1e4,
}
FIELDS = {"layers": 4, "norm_eps": 1e-6, "tied": False, "norm": "rms", "clip_qkv": 2.5, "rope": Rope()}


def test_a_table_is_read_in_both_directions():
    assert read(TABLE, Keys(CONFIG, "x")) == FIELDS
    assert write(TABLE, SPEC.replace(**FIELDS)) == CONFIG


def test_what_is_not_stated_is_upstreams_and_noted():
    keys = Keys({"n_layers": 4, "base": 1e4}, "x", "model")
    found = read(TABLE, keys)
    assert (found["norm_eps"], found["tied"], found["norm"], found["clip_qkv"]) == (1e-5, True, "layer", None)
    assert keys.note("upstream") == [
        "not stated, taken as upstream takes it: model.eps = 1e-05, model.norm = 'LN', model.scale = 1.0"
    ]


def test_a_value_without_a_word_becomes_the_first_which_reading_back_tells():
    assert write(TABLE, SPEC.replace(norm="none"))["norm"] == "LN"


def test_all_that_no_spec_says_is_told_at_once():
    keys = Keys({**CONFIG, "alibi": True, "scale": 2.0}, "x", "model")
    read(TABLE, keys)
    with pytest.raises(ConfigError, match=r"this is not supported: model.alibi: true; model.scale: another scale"):
        keys.check()
    keys = Keys({**CONFIG, "alibi": 0}, "x")  # 0 is not false
    read(TABLE, keys)
    assert keys.refused == ["alibi: 0"]


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("n_layers", ..., "n_layers is missing"),
        ("n_layers", 0, "n_layers is 0, not a whole number from 1 on"),
        ("n_layers", True, "n_layers is True"),
        ("eps", "small", "eps is 'small', not a positive number"),
        ("untied", 1, "untied is 1, not one of"),
        ("norm", "batch", "norm is 'batch', not one of LN, RMS"),
        ("clip", [1], "clip is <list>, not a positive number"),
    ],
)
def test_wrong_types_are_errors(key, value, why):
    config = {k: v for k, v in {**CONFIG, key: value}.items() if v is not ...}
    with pytest.raises(ConfigError, match=why):
        read(TABLE, Keys(config, "x"))


def test_nulls_may_mean_absent():
    config = {**CONFIG, "eps": None}
    with pytest.raises(ConfigError, match="eps is None"):
        read(TABLE, Keys(config, "x"))
    assert read(TABLE, Keys(config, "x", nulls=True))["norm_eps"] == 1e-5


def test_unknown_keys_of_all_sections_are_told():
    keys = Keys({**CONFIG, "odd": 1, "off": False, "below": {"a": 1, "b": 2, "seed": 3}}, "x", "model")
    read(TABLE, keys)
    keys.below("below", {}, {"seed"}).integer("a")
    assert keys.unknown(()) == {"model.odd": 1, "model.below.b": 2}
    assert keys.unknown({"odd"}, silent=(None,)) == {"model.off": False, "model.below.b": 2}
