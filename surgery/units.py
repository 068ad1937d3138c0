"""Sizes as people write them: `5GB`, `512MiB`, `1000`.

parse_size("512MiB") == 512 << 20
human(2_000_000_000) == "2.0 GB"
parse_count("50B") == 50_000_000_000        # of tokens
"""

from __future__ import annotations

import math
import re

from surgery.errors import UsageError


def parse_size(text: str, least: int = 1) -> int:
    """Bytes.  Raises UsageError if the text is no size, or one below `least`."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([kKMGT]?)(i?)[bB]?", text.strip())
    nbytes = 0
    if match:
        power = " KMGT".index(match[2].upper() or " ")
        nbytes = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if nbytes < 1:
        raise UsageError(f"{text[:40]!r} is no size", hint="write for example 5GB or 512MiB")
    if nbytes < least:
        raise UsageError(f"{text} is {human(nbytes)}, too little", hint=f"at least {human(least)}, for example 5GB")
    return nbytes


def shard_size(text: str) -> int:
    """Bytes of the largest file of weights.  Raises UsageError below a kilobyte."""
    return parse_size(text, 1000)


def parse_count(text: str) -> int:
    """A whole number: 4096, 50e9, 1.5B.  Raises UsageError."""
    units = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
    match = re.fullmatch(r"([0-9]{1,18})(?:\.([0-9]{1,9}))?(?:e([0-9]{1,2})|([kMBT]?))", text.strip().replace("_", ""))
    number, rest = 0, 0
    if match:
        scale = 10 ** int(match[3]) if match[3] else units[match[4]]
        number, rest = divmod(int(match[1] + (match[2] or "")) * scale, 10 ** len(match[2] or ""))
    if number < 1 or rest:
        raise UsageError(f"{text[:40]!r} is no whole number from 1 on", hint="write for example 4096, 500M or 50e9")
    return number


def divisors(n: int, *others: int) -> str:
    """The parts that numbers can be divided into alike, as a hint says them: divisors(8) == "1, 2, 4 or 8"."""
    found = [str(d) for d in range(1, min(math.gcd(n, *others), 4096) + 1) if math.gcd(n, *others) % d == 0]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"


def human(nbytes: float) -> str:
    """Three digits and a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.0f} {unit}" if nbytes >= 99.5 or unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def count(n: float) -> str:
    """A number of parameters: 134.5M."""
    for unit in ("", "k", "M", "B"):
        if n < 999.5:
            return f"{n:.4g}{unit}"
        n /= 1000
    return f"{n:.4g}T"
