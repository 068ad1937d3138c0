"""Lines that hold no document: what can be wrong with one, how many are borne, and what is said of them.

limit = Limit.parse("0.1%")                  # or a number of lines, such as "12"
limit.allows(bad=3, lines=20_000)            # True
BadLine("a.jsonl.gz", 7, "not JSON", "Expecting value").report()
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from surgery.errors import UsageError, show

BLANK = "blank line"
NOT_UTF8 = "not UTF-8"
NOT_JSON = "not JSON"
NOT_OBJECT = "not an object"
NO_TEXT = "no text"
WRONG_TYPE = "text of a wrong type"
WRONG_NAME = "id of a wrong type"
SURROGATE = "half of a surrogate pair"
CHAT = "no conversation"
TEMPLATE = "refused by the chat template"
TOKENIZER = "refused by the tokenizer"
BROKEN = "broken file"

EARLY = 10  # bad lines that a share always bears before the end, as the first thousand lines tell little
SHOWN = 5  # of them, in messages


@dataclass(frozen=True)
class Bad:
    """What is wrong with line `line` (from 1) of a file: one of the kinds above, and details."""

    line: int
    kind: str
    detail: str = ""


@dataclass(frozen=True)
class BadLine:
    """As it is reported."""

    file: str
    line: int
    kind: str
    detail: str

    def report(self) -> str:
        """A line of JSON."""
        return json.dumps(asdict(self)) + "\n"

    def __str__(self) -> str:
        return f"{ascii(self.file)[1:-1]} line {self.line}: {self.kind}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class Limit:
    """Bad lines that are borne: a share of all lines, or a number of them."""

    share: float | None
    count: int = 0

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Raises UsageError if the text is neither a percentage nor a number."""
        if match := re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)%", text.strip()):
            return cls(float(match[1]) / 100)
        if re.fullmatch(r"[0-9]{1,15}", text.strip()):
            return cls(None, int(text))
        raise UsageError(f"--max-bad {show(text)}: write a share as 0.1% or a number of lines")

    def allows(self, bad: int, lines: int, ended: bool = True) -> bool:
        """Whether so many bad ones of so many lines are borne; not `ended`: so far."""
        if self.share is None:
            return bad <= self.count
        allowed = math.floor(self.share * lines + 1e-9)
        return bad <= (allowed if ended or not self.share else max(allowed, EARLY))

    def __str__(self) -> str:
        return f"{self.count} lines" if self.share is None else f"{self.share * 100:.9g}% of all lines"


def summary(bad: int, lines: int, kinds: Counter[str]) -> str:
    """3 of 12000 lines are bad (0.025%): 2 not JSON, 1 no text."""
    named = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
    verb = "line is" if lines == 1 else "lines are"
    return f"{bad} of {lines} {verb} bad ({bad / max(1, lines):.3%}): {named}"


def kinds_of(bad: Iterable[BadLine]) -> Counter[str]:
    return Counter(line.kind for line in bad)
