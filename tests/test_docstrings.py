"""Docstrings: the calls in their examples are calls that the code takes, and every package names its files."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import surgery
from tests.test_imports import FILES, ROOT, where

MISSING = object()
# modules that cannot be imported without what a machine may lack, or that must be imported by a folder of their own
ELSEWHERE = ("formats/hf/hub/", "merging/engine/kernels/", "__main__.py")


def module_of(path: Any) -> ModuleType:
    name = ".".join(["surgery", *path.relative_to(ROOT).with_suffix("").parts])
    return importlib.import_module(name.removesuffix(".__init__"))


def named(node: ast.expr, names: dict[str, Any]) -> Any:
    """What `a` or `a.b` is, `a` the module's or `surgery`; MISSING if `a` is a variable of the example."""
    if isinstance(node, ast.Name):
        return names.get(node.id, MISSING)
    if isinstance(node, ast.Attribute):
        owner = named(node.value, names)
        if inspect.isclass(owner) or owner is surgery:
            return getattr(owner, node.attr, None)  # None cannot be called, and so is found
    return MISSING


def code(line: str) -> ast.Module | None:
    """A line of an example without the remark behind it; None if it is no code."""
    text = re.split(r"\s{2,}#|\s+->", line.strip())[0].rstrip()
    for closed in (text, f"{text} ...", f"{text}\n def f(): ..."):
        try:
            return ast.parse(closed)
        except SyntaxError:
            continue
    return None


def calls(module: ModuleType) -> Iterator[tuple[str, Any, ast.Call]]:
    """The calls of a module's example, each with its line and what it calls."""
    names = {"surgery": surgery, **vars(module)}
    for line in (module.__doc__ or "").split("\n"):
        if "(" not in line or not (tree := code(line)):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (callee := named(node.func, names)) is not MISSING:
                yield line.strip(), callee, node


def arguments(call: ast.Call) -> tuple[list[object], dict[str, object]] | None:
    """What a call gives; None where `...` or a star leaves it open."""
    given = [*call.args, *(k.value for k in call.keywords)]
    if any(isinstance(a, ast.Starred) or (isinstance(a, ast.Constant) and a.value is ...) for a in given):
        return None
    return [None] * len(call.args), {k.arg: None for k in call.keywords if k.arg}


@pytest.mark.parametrize("path", [p for p in FILES if not where(p).startswith(ELSEWHERE)], ids=where)
def test_examples_are_calls_that_the_code_takes(path):
    try:
        module = module_of(path)
    except ImportError as error:
        pytest.skip(str(error))
    for line, callee, call in calls(module):
        assert callable(callee), line
        given = arguments(call)
        if given is None:
            continue
        try:
            signature = inspect.signature(callee)
        except ValueError:  # of a builtin
            continue
        try:
            signature.bind(*given[0], **given[1])
        except TypeError as error:
            pytest.fail(f"{line}: {error}")


def test_a_wrong_example_is_found():
    module = ModuleType("wrong", "Cuts.\n\n    half = cut(whole, at=3)     # one of two\n    cut(whole, where=3)\n")
    exec("def cut(whole, *, at): ...", vars(module))
    found = list(calls(module))
    assert [line.split("  ")[0] for line, _, _ in found] == ["half = cut(whole, at=3)", "cut(whole, where=3)"]
    good, wrong = (arguments(call) for _, _, call in found)
    assert good and wrong
    inspect.signature(vars(module)["cut"]).bind(*good[0], **good[1])
    with pytest.raises(TypeError):
        inspect.signature(vars(module)["cut"]).bind(*wrong[0], **wrong[1])
