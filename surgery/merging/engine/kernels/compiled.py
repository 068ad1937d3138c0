"""Loops that numba compiles, for where the passes of torch and numpy over memory cost more than the arithmetic.

    @compiled
    def scale(values, factor): ...

Modules that import this one need numba, which is optional.  Code is compiled at its first call and kept for the next
process, beside the source or, where that cannot be written, in numba's cache folder.  No flag lets it reorder
arithmetic: results are those of the same operations in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit, types
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])


def compiled(fn: F) -> F:
    """`fn`, compiled; other threads run while it does."""
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(fn)
    except RuntimeError:  # no folder for a cache can be written
        return njit(nogil=True, error_model="numpy")(fn)


@intrinsic
def fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c of three fp32 or three fp64 numbers, rounded once."""
    return a(a, a, a), _emit_fma


def _emit_fma(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.fma(*arguments)


@intrinsic
def float_of(context: Any, bits: Any) -> Any:
    """The fp32 number that has these 32 bits."""
    return types.float32(types.uint32), _emit_cast


@intrinsic
def bits_of(context: Any, number: Any) -> Any:
    """The 32 bits of an fp32 number."""
    return types.uint32(types.float32), _emit_cast


def _emit_cast(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))
