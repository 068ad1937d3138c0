"""One run of one step: its command, what it reads and makes, and which steps come before it.

step.command(near)                  # ["convert", "models/llama", "runs/demo/meta", "--to", "meta"]
step.file(".log")                   # runs/demo/steps/meta.log
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.jobs import names as refs
from surgery.jobs.names import Names, Shown, Thing, Where
from surgery.jobs.spec import Resources, StepSpec
from surgery.storage.address import spelled


@dataclass(frozen=True, eq=False)
class Step:
    """A step of a recipe, for one combination of the values of its matrix.

    id        its name and these values: train, train-42       where     the values
    names     what the names in its command mean               outputs   name -> what it makes
    inputs    all that it reads; `maker` says which step makes it
    needs     ids of the steps that come before it             files     the folder of its record and its log
    """

    id: str
    name: str
    where: Where
    spec: StepSpec
    names: Names
    inputs: tuple[Thing, ...]
    outputs: Mapping[str, Thing]
    needs: tuple[str, ...]
    resources: Resources
    files: Path
    env: Mapping[str, str] = field(default_factory=dict)

    def command(self, shown: Shown) -> list[str]:
        """The words of the command; of a shell step the one text that bash is given."""
        if self.spec.shell is not None:
            return [refs.shell_text(self.spec.shell, self.names, shown)]
        return refs.words(self.spec.line, self.names, shown)

    def config(self, shown: Shown) -> Any:
        """What is written to `$config`; None if there is none."""
        return None if self.spec.config is None else refs.value(self.spec.config, self.names, shown)

    @property
    def title(self) -> str:
        """What it does, in a few words; "" if the recipe does not say."""
        return refs.text(self.spec.about, self.names, near)

    def file(self, suffix: str) -> Path:
        """`.json` is its record, `.log` what it printed, `.yaml` its config, `.lock` held while it runs."""
        return self.files / f"{self.id}{suffix}"


def near(thing: Thing) -> str:
    """Its path as one would type it: relative to the working folder, if it lies below it."""
    return near_path(thing.path)


def near_path(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else spelled(path)


def absolute(thing: Thing) -> str:
    """Its path for a config, whose reader may start from another folder."""
    return spelled(thing.path)
