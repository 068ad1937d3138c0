"""Many names in few words, for errors: names that differ in numbers, or in one word, become one.

collapsed(["layers.0.q_proj.weight", "layers.1.q_proj.weight", "layers.0.k_proj.weight", "layers.1.k_proj.weight"])
    # ["layers.N.{k,q}_proj.weight (2 of each)"]
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_MANY = 200  # templates; more than these are not compared with each other


def collapsed(names: Iterable[str]) -> list[str]:
    """Templates with N for numbers and {a,b} for words, and how many names each stands for."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\b\d+\b", "N", name), []).append(name)
    counts = {template if len(group) > 1 else group[0]: len(group) for template, group in groups.items()}
    joined = list(counts.items()) if len(counts) > _MANY else _joined(counts)
    return [words + _times(words, count) for words, count in joined]


def _times(words: str, count: int) -> str:
    return "" if count == 1 else f" ({count} of each)" if "{" in words else f" ({count})"


def _joined(counts: dict[str, int]) -> list[tuple[str, int]]:
    """Templates of the same count that differ in one component as one, with all its words."""
    left, out = dict(counts), []
    while left:
        first = next(iter(left))
        count = left.pop(first)
        words = first.split(".")
        like = [
            [t for t, n in left.items() if n == count and _alike(t.split("."), words, i)] for i in range(len(words))
        ]
        place = max(range(len(words)), key=lambda i: len(like[i]))
        variants = sorted({words[place], *(t.split(".")[place] for t in like[place])})
        for template in like[place]:
            del left[template]
        out.append((".".join((*words[:place], _braced(variants), *words[place + 1 :])), count))
    return out


def _alike(one: Sequence[str], other: Sequence[str], place: int) -> bool:
    """Whether two lists of words differ in one place at most."""
    return len(one) == len(other) and all(a == b for i, (a, b) in enumerate(zip(one, other, strict=True)) if i != place)


def _braced(words: Sequence[str]) -> str:
    """["k_proj", "q_proj"] -> "{k,q}_proj"."""
    if len(words) == 1:
        return words[0]
    start = _common(words)
    rest = [word[start:] for word in words]
    end = _common([word[::-1] for word in rest])
    middles = ",".join(word[: len(word) - end] for word in rest)
    return f"{words[0][:start]}{{{middles}}}{words[0][len(words[0]) - end :]}"


def _common(words: Sequence[str]) -> int:
    """How many letters all words begin with."""
    return next(
        (i for i, letters in enumerate(zip(*words, strict=False)) if len(set(letters)) > 1), min(map(len, words))
    )
