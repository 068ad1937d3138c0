"""The surgery commands of a recipe, looked at before its first step: wrong flags, values and keys of a run.

check_commands(wanted, main, "recipe.yaml")     # ConfigError: recipe.yaml: step meta: No such option '--tpp' ...
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from surgery.jobs.step import Step


def check_commands(steps: Iterable[Step], main: click.Command, file: str) -> None:
    """Nothing is run.  Raises ConfigError naming each step that its command would refuse as it is written."""
    from surgery.jobs.problems import Problems
    from surgery.jobs.step import absolute

    problems = Problems(file)
    for step in steps:
        if step.spec.surgery is not None:
            with problems.at(f"step {step.name}"):
                name, given = _parsed(step.command(absolute), main)
                if name == "midtrain" and step.spec.config is not None and given.get("run"):
                    _check_run(step.config(absolute), given)
    problems.check()


def _parsed(words: list[str], command: click.Command) -> tuple[str, Mapping[str, Any]]:
    """The name of the command, and what its flags and arguments are given.  Raises UsageError."""
    from surgery.errors import UsageError

    path, context = [], click.Context(command, info_name="surgery")
    try:
        while isinstance(command, click.Group):
            if not words:
                raise click.UsageError("Missing command.", context)
            if words[0].startswith("-"):  # resolve_command would do what it says
                command.make_parser(context).parse_args(words)
                return "", {}
            name, found, words = command.resolve_command(context, words)
            assert name and found
            command, context = found, click.Context(found, info_name=name, parent=context)
            path.append(name)
        given, left, _ = command.make_parser(context).parse_args(words)
        if any(p.is_eager and given.get(p.name or "") is True for p in command.get_params(context)):  # --help
            return "", {}
        for parameter in command.params:
            _check_value(parameter, given, context)
    except click.UsageError as wrong:
        raise UsageError(wrong.format_message(), hint=f"surgery {' '.join(path)} --help") from None
    if left:
        raise UsageError(f"surgery {' '.join(path)}: what is {left[0]}?", hint=f"surgery {' '.join(path)} --help")
    return " ".join(path), given


def _check_value(parameter: click.Parameter, given: Mapping[str, Any], context: click.Context) -> None:
    """Raises click's UsageError, or ours for a format that there is not."""
    from surgery.formats.registry import named

    value = given.get(parameter.name or "")
    if not (value and isinstance(value, (str, list, tuple))):
        if parameter.required:
            raise click.MissingParameter(ctx=context, param=parameter)
        return
    parameter.type_cast_value(context, value)
    if parameter.metavar == "FORMAT" and isinstance(value, str):
        named(value)


def _check_run(config: Any, given: Mapping[str, Any]) -> None:
    """Raises ConfigError with every key of a run that is wrong."""
    from surgery.midtraining.run_file import apply_set, make_run

    value = copy.deepcopy(config)
    for text in given.get("sets") or ():
        apply_set(value, text)
    make_run(value | ({"output": given["output"]} if given.get("output") else {}))
