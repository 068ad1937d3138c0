"""Flags that no request says of itself, for commands that must begin at once: no setting is read for them.

@click.command("run")
@with_flags((STEP, JSON))
def run_command(step, as_json): ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

Flag = Callable[[Callable[..., Any]], Callable[..., Any]]

JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


def with_flags(*groups: Sequence[Flag]) -> Flag:
    """A decorator that gives a command all flags of these groups, in this order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for flag in reversed([flag for group in groups for flag in group]):
            function = flag(function)
        return function

    return decorate
