"""What a merge method promises: its parameters, how many models it takes, whether it needs a base.

    Method("slerp", slerp, (Parameter("t", "float", required=True),), base="required", models=(2, 2))

A method is a plain function from `Inputs` and options to `Ready`: what to do with a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from surgery.merging.engine.ready import Run


@dataclass(frozen=True)
class Parameter:
    """What a method can be told: kind is float, int or bool; scope "all", or per "input", or per "other" than the base.

    `default` None with `required` False means that nothing happens unless it is given.
    """

    name: str
    kind: str
    scope: str = "all"
    default: Any = None
    required: bool = False


@dataclass(frozen=True)
class Method:
    """`base`: ignored, optional or required; `models` and `others` (than the base): how few and how many."""

    name: str
    run: Run
    parameters: tuple[Parameter, ...] = ()
    base: str = "ignored"
    models: tuple[int, int | None] = (1, None)
    others: tuple[int, int | None] = (0, None)
    random: bool = False

    def shared_names(self) -> tuple[str, ...]:
        """What may stand at the whole merge, a module or a slice: everything."""
        return tuple(p.name for p in self.parameters)

    def input_names(self) -> tuple[str, ...]:
        """What may stand at a model."""
        return tuple(p.name for p in self.parameters if p.scope != "all")

    def refuses(self, count: int, based: bool) -> str | None:
        """Why the method cannot take `count` models, of which one may be the base."""
        if self.base == "required" and not based:
            return "needs a base model"
        others = count - (based and self.base != "ignored")
        for n, (least, most), what in ((count, self.models, "models"), (others, self.others, "models beside the base")):
            if n < least or (most is not None and n > most):
                wanted = (
                    f"exactly {least}" if least == most else f"at least {least}" if n < least else f"at most {most}"
                )
                return f"takes {wanted} {what if wanted[-2:] != ' 1' else what.replace('models', 'model')}, not {n}"
        return None
