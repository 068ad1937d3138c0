"""What can be asked of a merge besides its YAML, and of a search for better weights.

Soup(to="meta", arithmetic="mergekit")
Choosing(greedy=True, text="held-out.txt").method       # "greedy"
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from surgery.conversion.request import Divided
from surgery.errors import UsageError
from surgery.settings import Checked, setting


@dataclass(frozen=True, kw_only=True)
class Soup(Divided):
    """How a merge is computed and written."""

    threads: int | None = setting(None, "Threads that compute.", metavar="N", low=1, otherwise="all cores")
    arithmetic: str = setting(
        "fp32",
        "fp32: round once, at the end. mergekit: work in the YAML's dtype, or the models', as mergekit does, rounding "
        "every intermediate result.",
        choices=("fp32", "mergekit"),
    )


@dataclass(frozen=True, kw_only=True)
class Choosing(Checked):
    """Which models, or which weights: chosen by the loss on a held-out text."""

    greedy: bool = setting(False, "Keep only models that lower the loss on --eval, best first.")
    search: int | None = setting(
        None, "Try N weightings and take that with the lowest loss on --eval.", metavar="N", low=1
    )
    text: str | os.PathLike[str] | None = setting(
        None, "A held-out text for --greedy or --search.", metavar="TEXT", flag="eval"
    )
    tokens: int = setting(8192, "How much of it.", low=8, flag="eval-tokens")
    device: str | None = setting(
        None, "Where --eval runs: cpu, cuda, ...", metavar="NAME", otherwise="a GPU if there is one"
    )
    log: str | None = setting(
        None, "What was tried, one line each; tried weightings are not tried again.", metavar="FILE",
        otherwise="DST.tried.jsonl",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.method and (self.text or self.log):
            raise UsageError("--eval and --log go with --greedy or --search")
        if self.greedy and self.search:
            raise UsageError(
                "--greedy and --search exclude each other", hint="search the weights of the greedy soup later"
            )
        if self.method and not self.text:
            raise UsageError(f"--{self.method} needs a text to measure the loss on", hint="--eval TEXT")

    @property
    def method(self) -> str:
        """ "greedy", "search", or "" if nothing is to be chosen."""
        return "greedy" if self.greedy else "search" if self.search else ""
