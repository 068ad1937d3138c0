"""The group of all commands: each is imported when it is asked for, and every error becomes one message.

@click.group(cls=Group, commands=Commands({"convert": "surgery.cli.convert"}), about={"convert": "Convert."})
def main(): ...
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, NoReturn

import click

from surgery.cli.command import LOG
from surgery.cli.terminal import ASIDE, Stopped, lenient_streams, owners_rights, say, stoppable, talking

if TYPE_CHECKING:
    from surgery.errors import SurgeryError


class Commands(MutableMapping[str, click.Command]):
    """Commands by name; that of `NAME` is `NAME_command` in its module, which is imported when it is asked for."""

    def __init__(self, modules: Mapping[str, str]) -> None:
        self.modules, self.known = dict(modules), dict[str, click.Command]()

    def __getitem__(self, name: str) -> click.Command:
        if name not in self.known:
            module = importlib.import_module(self.modules[name])
            self.known[name] = getattr(module, f"{name}_command")
        return self.known[name]

    def __setitem__(self, name: str, command: click.Command) -> None:
        self.modules[name], self.known[name] = "", command

    def __delitem__(self, name: str) -> None:
        del self.modules[name]
        self.known.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)


class Group(click.Group):
    """Turns every SurgeryError into one message and an exit status: 2 for flags, 1 for everything else.

    about  a line about each command, so that help imports none of them
    """

    def __init__(self, *args: Any, about: Mapping[str, str], **more: Any) -> None:
        super().__init__(*args, **more)
        self.about = about

    def main(self, *args: Any, **more: Any) -> Any:
        """Run, and end; at once where this is one of several processes."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return super().main(*args, **more)
        ending = Ending()
        try:
            return super().main(*args, **more)
        except SystemExit as ended:
            ending.status = ended.code
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands in help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.about[name]) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> Any:
        from surgery.errors import SurgeryError, UsageError, reported

        lenient_streams()
        as_json = "--json" in ctx.args
        with talking():
            try:
                with stoppable(), owners_rights(), reported():
                    return super().invoke(ctx)
            except SurgeryError as error:
                _fail(error, as_json)
            except click.exceptions.NoArgsIsHelpError:
                raise
            except click.UsageError as wrong:
                _fail(UsageError(wrong.format_message(), hint=_advice(wrong)), as_json)
            except Stopped as stopped:
                say(f"stopped by {signal.Signals(stopped.signum).name}", err=True)
                raise
            except KeyboardInterrupt:
                say("stopped by SIGINT", err=True)
                sys.exit(128 + signal.SIGINT)
            except BrokenPipeError:
                return _unread()


class Ending:
    """How a process of several ends: without taking Python down, when all has been done that is due at its exit.

    Threads of gloo outlive `destroy_process_group` as long as a divided model holds their groups, and one that lets go
    of a tensor while Python is taken down aborts the process (pytorch issue 190489), however well the run went.
    """

    def __init__(self) -> None:
        self.status: str | int | None = 1
        atexit.register(self.at_once)  # before a command's libraries register theirs, which are thus called first

    def at_once(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(self.status if isinstance(self.status, int) else 0 if self.status is None else 1)


def _advice(wrong: click.UsageError) -> str:
    """What to look at; the formats, where one is missing."""
    if isinstance(wrong, click.MissingParameter) and wrong.param and wrong.param.metavar == "FORMAT":
        from surgery.formats.registry import FORMATS

        return f"formats: {', '.join(FORMATS)}"
    words = wrong.ctx.command_path.split()[1:] if wrong.ctx else []
    return " ".join(["surgery", *words, "--help"])


def _unread() -> NoReturn:
    """Nobody reads what is printed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def _fail(error: SurgeryError, as_json: bool) -> NoReturn:
    from surgery.errors import UsageError

    if as_json:
        click.echo(json.dumps({"error": error.to_json()}, indent=2))
    say("error: ", err=True, fg="red", bold=True, nl=False)
    say(str(error), err=True)
    LOG.error("%s", error, extra={ASIDE: True})
    LOG.debug("it comes from", exc_info=error)
    signum = getattr(error, "signum", None)
    plain = 128 + signum if signum else 2 if isinstance(error, UsageError) else 1
    sys.exit(getattr(error, "status", plain))
