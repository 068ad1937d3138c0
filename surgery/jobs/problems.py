"""All that is wrong with a recipe, raised once.

problems = Problems("recipe.yaml")
with problems.at("step train", line=12):
    ...                                     # a ConfigError or UsageError in here is noted
problems.check()                            # ConfigError: recipe.yaml: line 12: step train: ...
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from surgery.errors import ConfigError, UsageError


class Problems:
    """What was found so far in a file, with the hint that goes with each."""

    def __init__(self, file: str | os.PathLike[str] | None) -> None:
        self.file, self.found = file, dict[str, str | None]()

    @contextmanager
    def at(self, where: str, line: int | None = None) -> Iterator[None]:
        try:
            yield
        except (ConfigError, UsageError) as error:
            place = (f"line {line}: " if line else "") + (f"{where}: " if where else "")
            self.found.setdefault(place + error.what, error.hint)

    def check(self) -> None:
        """Raise ConfigError if there was anything."""
        if self.found:
            hint = next(filter(None, self.found.values()), None)
            raise ConfigError("\n  ".join(self.found), file=self.file, hint=hint)
