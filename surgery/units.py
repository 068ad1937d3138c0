"""Sizes as people write them: `5GB`, `512MiB`, `1000`.

parse_size("512MiB") == 512 << 20
human(2_000_000_000) == "2.0 GB"
"""

from __future__ import annotations

import re

from surgery.errors import UsageError


def parse_size(text: str) -> int:
    """Bytes.  Raises UsageError if the text is no size."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([kKMGT]?)(i?)[bB]?", text.strip())
    nbytes = 0
    if match:
        power = " KMGT".index(match[2].upper() or " ")
        nbytes = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if nbytes < 1:
        raise UsageError(f"{text[:40]!r} is no size", hint="write for example 5GB or 512MiB")
    return nbytes


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
