"""Mixtures: strict YAML, and amounts that keep the budget, the caps and the weights."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.data.plans.amounts import amounts
from surgery.data.plans.apportion import Want, apportion
from surgery.data.plans.mixture import Mixture, read_mixture
from surgery.errors import ConfigError, FileError

RECIPES = Path(__file__).parent.parent / "recipes" / "mixtures"


def mixture(**more: object) -> Mixture:
    """Sources of 100 tokens an instance, so that amounts are easy to read."""
    return Mixture.model_validate({"sequence_length": 100, **more})


def test_what_a_cap_keeps_back_goes_to_the_others():
    wants = [Want("a", weight=0.5, cap=400), Want("b", weight=0.3, cap=100), Want("c", weight=0.2, cap=1000)]
    shares = apportion(1000, wants)
    assert [s.rows for s in shares] == [400, 100, 500]
    assert [s.asked for s in shares] == [500, 300, 200]


def test_rounding_is_by_largest_remainder_and_decimals_mean_what_they_say():
    assert [s.rows for s in apportion(10, [Want("a", weight=1), Want("b", weight=1), Want("c", weight=1)])] == [4, 3, 3]
    assert [s.rows for s in apportion(1000, [Want(n, weight=0.1) for n in "abcdefghij"])] == [100] * 10
    assert [s.rows for s in apportion(None, [Want("a", fixed=Fraction(323, 10)), Want("b", fixed=500)])] == [32, 500]


wants = st.lists(
    st.tuples(
        st.one_of(st.floats(0.01, 100), st.integers(1, 9)), st.booleans(), st.one_of(st.none(), st.integers(0, 500))
    ),
    min_size=1,
    max_size=7,
)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(wants, st.integers(1, 2000))
def test_amounts_add_up_keep_caps_and_keep_proportions(given_wants, total):
    """Against a slow filling: one instance after another to whoever is furthest below its weight."""
    named = [
        Want(str(i), weight=None if fixed else w, fixed=w if fixed else None, cap=cap)
        for i, (w, fixed, cap) in enumerate(given_wants)
    ]
    asked = sum(Fraction(str(w.fixed)) for w in named if w.fixed is not None)
    weighted = [w for w in named if w.weight is not None]
    if not weighted or asked > total:
        return
    shares = {s.name: s for s in apportion(total, named)}
    rows = {name: s.rows for name, s in shares.items()}
    assert all(rows[w.name] <= w.cap for w in named if w.cap is not None)
    limit = sum(
        min(Fraction(str(w.fixed)), w.cap if w.cap is not None else total) for w in named if w.fixed is not None
    )
    room = sum(total if w.cap is None else w.cap for w in weighted)
    assert sum(rows.values()) == int(min(total, limit + room))
    open_ = [w for w in weighted if w.cap is None or rows[w.name] < w.cap]
    for a in open_:  # who is below its cap has its share, to within the rounding
        for b in open_:
            assert rows[a.name] / a.weight - rows[b.name] / b.weight <= 1 / a.weight + 1 / b.weight + 1e-9
    for full in weighted:  # and nobody at a cap would have had less
        for o in open_:
            if full not in open_ and full.cap:
                assert (rows[full.name] - 1) / full.weight <= (rows[o.name] + 1) / o.weight + 1e-9


SOURCES = [{"name": "web", "paths": "web", "weight": 0.7}, {"name": "math", "paths": "math", "weight": 0.3}]


def test_amounts_with_caps_holdout_and_notes():
    m = mixture(budget={"tokens": 100_000}, holdout=0.01, sources=[SOURCES[0], {**SOURCES[1], "max_epochs": 2}])
    found, notes = amounts(m, {"web": 5000, "math": 100})
    assert [(a.heldout, a.have, a.take) for a in found] == [(50, 4950, 802), (1, 99, 198)]
    assert notes == ["math gives 198 instances of 300 asked for: max_epochs 2"]
    with pytest.raises(ConfigError, match="math gives 198 instances of 300"):
        amounts(m.model_copy(update={"strict": True}), {"web": 5000, "math": 100})


def test_max_share_and_a_budget_that_cannot_be_met():
    m = mixture(budget={"tokens": 100_000}, sources=[{**SOURCES[0], "max_epochs": 1, "max_share": 0.5}, SOURCES[1]])
    found, notes = amounts(m, {"web": 5000, "math": 50})
    assert [a.take for a in found] == [500, 500]
    assert notes[0] == "web gives 500 instances of 700 asked for: max_share 0.5"
    assert notes[1] == "math is passed 10.0 times; beyond about 4 passes repetition is worth ever less"
    m = mixture(budget={"tokens": 100_000}, sources=[{**s, "max_epochs": 1.5} for s in SOURCES])
    found, notes = amounts(m, {"web": 100, "math": 101})
    assert [a.take for a in found] == [150, 151]
    assert notes[-1] == "all sources together give 301 instances of the 1,000 in the budget"


def test_multipliers_tokens_and_epochs():
    sources = [{"name": "a", "paths": "a", "multiplier": 0.0323}, {"name": "b", "paths": "b", "multiplier": 4}]
    have = {"a": 10_000, "b": 250}
    assert [a.take for a in amounts(mixture(sources=sources), have)[0]] == [323, 1000]
    twice = mixture(sources=sources, budget={"epochs": 2})
    assert [a.take for a in amounts(twice, have)[0]] == [646, 2000]
    weighted = mixture(sources=[{"name": n, "paths": n, "weight": 1} for n in "ab"], budget={"epochs": 2})
    assert [a.take for a in amounts(weighted, have)[0]] == [10_250, 10_250]
    mixed = mixture(
        budget={"tokens": 100_000},
        sources=[{"name": "a", "paths": "a", "weight": 1}, {"name": "b", "paths": "b", "tokens": 20_050}],
    )
    assert [a.take for a in amounts(mixed, have)[0]] == [800, 200]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"sources": SOURCES}, "weights need a budget"),
        (
            {"sources": [{"name": "a", "paths": "a", "tokens": 90_000}], "budget": {"tokens": 50_000}},
            "the budget has 500",
        ),
        ({"sources": [{"name": "a", "paths": "a", "tokens": 9000}], "budget": {"tokens": 50_000}}, "none has a weight"),
        ({"sources": [*SOURCES, {"name": "c", "paths": "c", "tokens": 1}], "budget": {"epochs": 1}}, "weights alone"),
        ({"sources": SOURCES, "budget": {"tokens": 99}}, "no instance of 100 tokens is left"),
        ({"sources": SOURCES, "budget": {"tokens": 1000}, "holdout": 60}, "60 are to be held out"),
    ],
)
def test_amounts_that_cannot_be(more, says):
    m = mixture(**more)
    with pytest.raises(ConfigError, match=says):
        amounts(m, {s.name: 60 + 10 * i for i, s in enumerate(m.sources)})


def test_every_wrong_key_is_named_with_its_line(tmp_path):
    path = tmp_path / "mix.yaml"
    path.write_text(
        "sequence_length: 4096\n"
        "budgt: 50B\n"
        "sources:\n"
        "  - name: web\n"
        "    paths: web/*.bin\n"
        "    weigth: 3\n"
        "  - {name: math, paths: m, weight: 1, tokens: 5}\n"
        "  - {name: 'a b', paths: m, weight: one}\n"
        "packing: best\n"
    )
    with pytest.raises(ConfigError) as caught:
        read_mixture(path)
    text = str(caught.value)
    for line in (
        "line 2: key 'budgt' is not known; did you mean 'budget'?",
        "line 6: key 'weigth' is not known; did you mean 'weight'?",
        "line 7: sources.1: math needs exactly one of weight, tokens, multiplier; it has ['weight', 'tokens']",
        "line 8: sources.2.name is 'a b'",
        "line 8: sources.2.weight is 'one'",
        "line 9: packing is 'best'",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- 1", "not keys and values"),
        ("sequence_length: 8\nsources: []", "sources are missing"),
        ("sequence_length: 8\nsources: {}", "line 2: sources is <dict>: input should be a list"),
        ("sources: [{name: a, paths: a, weight: 1}]", "sequence_length is missing"),
        ("sequence_length: 8\nsources: [{name: a, paths: [], weight: 1}]", "paths"),
        (
            "sequence_length: 8\nsources: [{name: a, paths: a, weight: 1}, {name: a, paths: b, weight: 1}]",
            "two sources",
        ),
        ("sequence_length: 8\nbudget: {tokens: 1, epochs: 2}\nsources: [{name: a, paths: a, weight: 1}]", "either"),
        ("sequence_length: 8.5\nsources: [{name: a, paths: a, weight: 1}]", "sequence_length is 8.5"),
        ("sequence_length: 8\nsources: [{name: a, paths: a, weight: -1}]", "weight is -1"),
        (
            "sequence_length: 8\nbudget: 40 kB\nsources: [{name: a, paths: a, weight: 1}]",
            "write for example 4096, 500M",
        ),
    ],
)
def test_mixtures_that_are_none(tmp_path, text, says):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises((ConfigError, FileError), match=says):
        read_mixture(tmp_path / "m.yaml")


def test_a_holdout_is_a_share_or_a_number(tmp_path):
    text = "sequence_length: 8\nholdout: {}\nsources: [{{name: a, paths: x, weight: 1}}]\n"
    for value, want in (("0.25", 0.25), ("3", 3), ("2.0", 2)):
        (tmp_path / "mix.yaml").write_text(text.format(value))
        assert read_mixture(tmp_path / "mix.yaml").holdout == want
    (tmp_path / "mix.yaml").write_text(text.format("1.5"))
    with pytest.raises(ConfigError, match=r"line 2: .*a share below 1, or a whole number"):
        read_mixture(tmp_path / "mix.yaml")


def test_numbers_as_people_write_them(tmp_path):
    for text, tokens in (("50B", 50 * 10**9), ("50e9", 50 * 10**9), ("{tokens: 1.5M}", 1_500_000), ("4096", 4096)):
        (tmp_path / "m.yaml").write_text(
            f"sequence_length: 8\nbudget: {text}\nsources: [{{name: a, paths: a, weight: 1}}]"
        )
        budget = read_mixture(tmp_path / "m.yaml").budget
        assert budget is not None and budget.tokens == tokens


# tokens of the sources as LLM-jp counted them, from its totals of 50B, 100B and 300B
SIZES = ("dclm", "flan", "pes2o", "math", "stackexchange", "wiki")


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("dolmino-50B", [0.0323, 0.5, 0.0515, 1, 1, 1]),
        ("dolmino-100B", [0.0685, 1, 0.167, 2, 1, 1]),
        ("dolmino-300B", [0.2078, 2, 1, 4, 4, 4]),
    ],
)
def test_the_mixtures_of_llm_jp(name, shares):
    """100,000 instances of each source: the published multiplier of each is what it gives."""
    m = read_mixture(RECIPES / f"{name}.yaml")
    assert tuple(s.name for s in m.sources) == SIZES
    found, _ = amounts(m, dict.fromkeys(SIZES, 100_000))
    assert [a.take / 100_000 for a in found] == pytest.approx(shares)


def test_the_mixture_of_llemma():
    m = read_mixture(RECIPES / "llemma.yaml")
    found, _ = amounts(m, {s.name: 10**8 for s in m.sources})
    total = sum(a.take for a in found)
    share = {a.name: a.take / total for a in found}
    assert share["arxiv"] + share["open-web-math"] + share["algebraic-stack"] == pytest.approx(0.95, abs=1e-6)
    assert share["open-web-math"] == pytest.approx(2 * share["arxiv"], abs=1e-6)
    assert share["arxiv"] == pytest.approx(2 * share["algebraic-stack"], abs=1e-6)
    assert (share["pile"], share["github"]) == pytest.approx((0.02, 0.03), abs=1e-6)
