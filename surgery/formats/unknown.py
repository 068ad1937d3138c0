"""What nobody here understands about a checkpoint: it stops the reading, unless it is allowed by name.

    notes = [Unknown("model.block.softcap", 30.0)]       # a reader's note on a key that it does not know
    settle(notes, "softcap", "config.json")              # the notes; ConfigError for what is not allowed

A key that is not understood may change what a model computes, so a conversion that goes on without it may give another
model.  Keys that are known to change nothing are data, with the reason, in each format's `inert.py` or `config.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from surgery.errors import ConfigError, show, some

ALL = "*"
WEIGHTS = {"float64", "float32", "float16", "bfloat16"}  # what a number of these stands for needs no scale


class Unknown(str):
    """The note that names a key, or something else about the weights, that is not understood."""

    name: str

    def __new__(cls, name: str, value: object = None, what: str = "") -> Unknown:
        stated = f" ({show(value)})" if value is not None else ""
        text = f"{show(name)}{stated} is not understood and was not used: " + (
            what or "if the model depends on it, the result is another model"
        )
        note = super().__new__(cls, text)
        note.name = name
        return note

    def allowed(self, names: Collection[str]) -> bool:
        """By its full path, or by the last word of it."""
        return bool({ALL, self.name, self.name.rpartition(".")[2]} & set(names))


def dtypes_in_words(dtypes: Iterable[str]) -> list[Unknown]:
    """The dtypes of which nobody can say what a weight is: FP8 and whole numbers without their scales, complex ones."""
    why = "weights of it are quantised, or nothing that a model computes with; to carry them as they are, allow it"
    return [Unknown(dtype, what=why) for dtype in sorted(set(dtypes) - WEIGHTS)]


def settle(notes: Iterable[str], allowed: str, file: str) -> Sequence[str]:
    """The notes, if all that is not understood is among the `allowed`, names with commas between.

    Raises ConfigError naming everything else.
    """
    notes, names = list(notes), allowed.split(",")
    refused = [n for n in notes if isinstance(n, Unknown) and not n.allowed(names)]
    if len(refused) == 1:
        raise ConfigError(refused[0], file=file, hint=_hint(refused))
    if refused:
        what = some((show(n.name) for n in refused), 20)
        raise ConfigError(f"these are not understood, and the model may depend on them: {what}", file=file,
                          hint=_hint(refused))  # fmt: skip
    return notes


def _hint(refused: Sequence[Unknown]) -> str:
    flags = " ".join(f"--allow-unknown {n.name.rpartition('.')[2]}" for n in refused[:3])
    return f"if you know that it changes nothing, {flags}{' ...' if len(refused) > 3 else ''} goes on without it"
