"""Settings say of themselves what checks, recipes, keywords and flags need: each fact once."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, fields
from typing import Any

import click
import pytest
from click.testing import CliRunner

import surgery
from surgery import settings
from surgery.cli.flags import flags_of, values_of, with_flags
from surgery.conversion.request import Convert, Write
from surgery.errors import ConfigError, UsageError
from surgery.merging.request import Choosing, Soup
from surgery.settings import Checked, in_file, keywords, read, said, setting, taking
from surgery.upcycling.request import Collapse, Edit, Upcycle

REQUESTS = (Convert, Soup, Choosing, Upcycle, Edit, Collapse)


@dataclass(frozen=True, kw_only=True)
class Blur(Checked):
    """Everything that a setting can be."""

    count: int = field(metadata=said("How many.", low=1, high=9))
    share: float = setting(0.5, "How much.", low=0, high=1)
    way: str = setting("box", "How.", choices=("box", "gauss"))
    twice: bool = setting(False, "Twice.")
    edges: bool = setting(True, "Edges, too.")
    layers: tuple[int, ...] = setting((), "Which.", metavar="L,L")
    names: tuple[str, ...] = setting((), "Whose.", many=True, flag="name")
    limit: int | None = setting(None, "At most.", metavar="SIZE", low=1)
    inner: object = None  # not for people


def test_values_are_checked_and_all_are_told():
    assert Blur(count=3, share=1).layers == ()
    with pytest.raises(UsageError) as error:
        Blur(count=0, share=2.0, way="boxx", twice=1, layers=[1.5], limit=True)
    for words in (
        "--count 0: choose 1 to 9", "--share 2.0: choose 0 to 1", "--way 'boxx' is unknown",
        "--twice 1 is not true or false", "--layers <tuple> is not a list of numbers", "--limit True is not a whole",
        "did you mean box?",
    ):  # fmt: skip
        assert words in str(error.value)
    with pytest.raises(UsageError, match="larger than anything"):
        Blur(count=1, limit=10**21)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"count": 3, "shaer": 0.1}, "there is no field 'shaer'\n  hint: did you mean share?"),
        ({"count": 3, "inner": 1}, "there is no field 'inner'"),
        ({"share": 0.1}, "--count is missing"),
        ({"count": "3"}, "--count '3' is not a whole number"),
        ({"count": 3, "layers": ["1"]}, "not a list of numbers"),
        ([1], "is no recipe"),
    ],
)
def test_a_recipe_that_is_wrong_is_named(values, words):
    with pytest.raises(ConfigError) as error:
        read(Blur, values, "blur.yaml")
    assert str(error.value).startswith("blur.yaml: ")
    assert words in str(error.value)


def test_flags_win_over_a_recipe():
    recipe = {"count": 3, "way": "gauss", "layers": [0, -1]}
    assert read(Blur, recipe, "blur.yaml") == Blur(count=3, way="gauss", layers=(0, -1))
    assert read(Blur, recipe, "blur.yaml", {"way": "box"}) == Blur(count=3, layers=(0, -1))
    with pytest.raises(UsageError, match="--way"):  # the flag's fault, not the file's
        read(Blur, recipe, "blur.yaml", {"way": "x"})
    with pytest.raises(ConfigError, match=r"^a: b"), in_file("a"):
        raise UsageError("b")
    assert keywords(Blur, {"way": 3}) == {"way": "3"}


def command(*words):
    """The values that flags give."""
    seen = {}

    @click.command()
    @with_flags(flags_of(Blur))
    def blur(**flags):
        seen.update(values_of(Blur, flags))

    done = CliRunner().invoke(blur, words, standalone_mode=False)
    assert done.exception is None, done.exception
    return seen


def test_flags():
    with pytest.raises(AssertionError, match="MissingParameter"):  # what has no default must be given
        command()
    assert command("--count", "3") == {"count": 3}
    assert command("--count", "3", "--share", "0.25", "--way", "gauss", "--twice", "--no-edges") == {
        "count": 3, "share": 0.25, "way": "gauss", "twice": True, "edges": False,
    }  # fmt: skip
    assert command("--count", "1", "--edges", "--layers", "0,-1", "--name", "a", "--name", "b", "--limit", "1MiB") == {
        "count": 1, "edges": True, "layers": (0, -1), "names": ("a", "b"), "limit": 1 << 20,
    }  # fmt: skip
    with pytest.raises(AssertionError, match="write numbers, as 0,-1"):
        command("--count", "1", "--layers", "0,x")


def test_keywords_of_a_function_are_the_fields():
    @taking(Blur)
    def blur(src, dst, request):
        """Blur it."""
        return src, dst, request

    assert blur("a", dst="b", count=2) == ("a", "b", Blur(count=2))
    assert list(inspect.signature(blur).parameters) == ["src", "dst", *(f.name for f in fields(Blur))]
    assert inspect.signature(blur).parameters["count"].default is inspect.Parameter.empty
    assert blur.__doc__.startswith("Blur it.")
    assert "share   How much." in blur.__doc__
    for words, call in {
        r"^blur\(\) got an unexpected keyword argument 'cuont'; did you mean count\?$": lambda: blur("a", "b", cuont=1),
        r"^blur\(\) missing a required argument: 'count'$": lambda: blur("a", "b"),
        r"^blur\(\) missing a required argument: 'dst'$": lambda: blur("a", count=1),
        r"^blur\(\) too many positional arguments$": lambda: blur("a", "b", 3),
    }.items():
        with pytest.raises(TypeError, match=words):
            call()


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: r.__name__)
def test_every_request_explains_itself(request_):
    """What is no flag is known by name: objects of Python that a shell cannot give."""
    silent = {f.name for f in fields(request_) if not settings.about(f)}
    assert silent <= {"topology", "options", "command", "progress", "proving"}
    hints = settings.types_of(request_)
    for f in fields(request_):
        if about := settings.about(f):
            assert about.help[0].islower() or about.help[0].isupper()
            assert about.help.endswith((".", "..."))
            assert f.default in about.choices or not about.choices
            assert hints[f.name][1] == (f.default is None) or hints[f.name][0] is Any


@pytest.mark.parametrize("name", ["convert", "soup", "upcycle", "experts", "collapse"])
def test_the_python_api_has_these_keywords_and_good_errors(name):
    function = getattr(surgery, name)
    names = set(inspect.signature(function).parameters)
    assert {f.name for f in fields(Write)} < names
    assert all(line in inspect.getdoc(function) for line in ("force  ", "verify  ", "Raises SurgeryError"))
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'veryfi'; did you mean ver"):
        function("a", "b", veryfi=True)
    given = {"upcycle": {"experts": 2, "top_k": 1}, "experts": {"top_k": 1}}.get(name, {})
    source = {"merge_method": "linear", "models": [{"model": "tests"}]} if name == "soup" else "tests"
    with pytest.raises(UsageError, match="there is no format 'hff'\n  hint: did you mean hf"):
        function(source, "b", to="hff", **given)
