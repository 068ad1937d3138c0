"""What a router starts from: rows [experts, model width], the same for all experts of a virtual group.

router(settings, layout, layer=3, width=576, dtype="bfloat16")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from surgery.errors import UsageError, show
from surgery.tensors.gather import Gather
from surgery.tensors.lazy import Fill, Lazy
from surgery.tensors.random import Random
from surgery.upcycling.dense_to_moe.measures import Measured, held_rows
from surgery.upcycling.dense_to_moe.resolve import Layout
from surgery.upcycling.dense_to_moe.settings import Settings

Start = Callable[[str, tuple[int, int], str, str, int], Lazy]  # argument, shape, dtype, name, seed -> rows


def _normal(argument: str, shape: tuple[int, int], dtype: str, name: str, seed: int) -> Lazy:
    try:
        std = float(argument or 0.02)
    except ValueError:
        std = -1.0
    if not 0 < std < 100:
        raise UsageError(f"--router normal:{show(argument)} is no standard deviation", hint="--router normal:0.02")
    return Random(shape, dtype, name, seed, std=std)


def _kaiming(argument: str, shape: tuple[int, int], dtype: str, name: str, seed: int) -> Lazy:
    """Uniform within 1 / sqrt(width), as torch initialises linear layers."""
    _nothing("kaiming", argument)
    return Random(shape, dtype, name, seed, bound=shape[1] ** -0.5)


def _zeros(argument: str, shape: tuple[int, int], dtype: str, name: str, seed: int) -> Lazy:
    _nothing("zeros", argument)
    return Fill(shape, dtype)


def _nothing(start: str, argument: str) -> None:
    if argument:
        raise UsageError(f"--router {start}:{show(argument)}: {start} takes no number", hint=f"--router {start}")


STARTS: Mapping[str, Start] = {"normal": _normal, "kaiming": _kaiming, "zeros": _zeros}


def check_router(wanted: Settings, layout: Layout) -> None:
    """Raise UsageError for a router that starts with ties, unless it is asked for in full."""
    if wanted.router_kind[0] == "zeros" and layout.top_k < layout.experts and not wanted.force_lossy:
        raise UsageError(
            "--router zeros: every token ties, and all of them choose the same experts, which then learn alone",
            hint="--router normal:0.02, or --force-lossy if that is what you want",
        )


def router(
    wanted: Settings, layout: Layout, layer: int, width: int, dtype: str, measured: Measured | None = None
) -> Lazy:
    """The rows of one layer's router."""
    start, argument = wanted.router_kind
    rows = layout.copies if layout.grouped else layout.experts
    if measured and layer in measured.rows:
        found = held_rows(measured.rows, layer, dtype)
    else:
        found = STARTS[start](argument, (rows, width), dtype, f"layers.{layer}.router", wanted.seed)
    if not layout.grouped:
        return found
    return Gather(found, 0, [i // layout.granularity for i in range(layout.experts)])
