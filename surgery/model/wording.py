"""Say in words what a model has that a format (or a family) cannot hold.

check_held("OLMo", spec, read_back)
    # ConfigError: OLMo cannot hold this olmo3: sliding window: 9 in 4 of 6 layers (would be: none)

Whether a format can hold a model is not written down anywhere: its config is written, read back, and must give the
same function.  What differs is then said here, in the words of `FIELDS`.
"""

from __future__ import annotations

from collections.abc import Mapping

from surgery.errors import ConfigError
from surgery.model.spec import FIELDS, Spec

Gaps = Mapping[str, tuple[object, object]]


def check_held(who: str, spec: Spec, back: Spec, hint: str | None = None) -> None:
    """Raise ConfigError if `back`, what the format makes of `spec`, computes something else."""
    if gaps := spec.changes(back):
        raise ConfigError(f"{who} cannot hold this {spec.family}: {in_words(gaps, 12)}", hint=hint)


def in_words(gaps: Gaps, limit: int = 5) -> str:
    """{"tied": (True, False)} -> "tied embeddings: yes (would be: no)"."""
    said = [_pair(name, has, gets) for name, (has, gets) in gaps.items()]
    more = f"; and {len(said) - limit} more" if len(said) > limit else ""
    return "; ".join(said[:limit]) + more


def _pair(name: str, has: object, gets: object) -> str:
    if name not in FIELDS:  # an error instead of a value
        return str(has)
    about = FIELDS[name]
    return f"{about.label}: {about.say(has)} (would be: {about.say(gets)})"


def say(name: str, value: object) -> str:
    """say("norm", "rms") -> "norm: RMSNorm"."""
    return f"{FIELDS[name].label}: {FIELDS[name].say(value)}"
