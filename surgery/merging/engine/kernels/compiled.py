"""`compiled`: numba's njit with a cache that knows all files of the folder.

    @compiled
    def scale(values, factor): ...

Modules that import this one need numba, which is optional.  Code is compiled at its first call and kept for the next
process.  numba recompiles a function when its file has changed, but not when a file that it imports has; the name of
the cache folder is therefore a digest of all files beside the function's.  No flag lets numba reorder arithmetic:
results are those of the same operations in torch.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from numba import config, njit, types
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])
USER_CACHE = "~/.cache/checkpoint-surgery"  # where the folder of the sources cannot be written


def compiled(fn: F) -> F:
    """`fn`, compiled without the interpreter's lock; dividing by zero gives what IEEE says."""
    folder = cache_folder(Path(fn.__code__.co_filename).parent)
    with _cached_in(folder) if folder else nullcontext():
        made: F = njit(nogil=True, error_model="numpy", cache=bool(folder))(fn)
    return made


@functools.cache
def cache_folder(sources: Path) -> Path | None:
    """Where code compiled from a folder of Python files is kept; None if no such place can be written.

    It is below NUMBA_CACHE_DIR if that is set, else beside the files or in the user's cache.
    """
    digest = hashlib.sha256()
    for path in sorted(sources.glob("*.py")):
        digest.update(hashlib.sha256(path.name.encode() + b"\0" + path.read_bytes()).digest())
    beside, user = sources / "__pycache__", Path(os.path.expanduser(USER_CACHE))
    for place in [Path(config.CACHE_DIR)] if config.CACHE_DIR else [beside, user]:
        folder = place / f"numba-{digest.hexdigest()[:16]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    return None


@contextmanager
def _cached_in(folder: Path) -> Iterator[None]:
    """numba takes the place of a function's cache from its settings, once, when it is decorated."""
    before, config.CACHE_DIR = config.CACHE_DIR, str(folder)
    try:
        yield
    finally:
        config.CACHE_DIR = before


@intrinsic  # type: ignore[untyped-decorator]
def fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c of three fp32 or three fp64 numbers, rounded once."""
    return a(a, a, a), _emit_fma


def _emit_fma(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.fma(*arguments)


@intrinsic  # type: ignore[untyped-decorator]
def float_of(context: Any, bits: Any) -> Any:
    """The fp32 number that has these 32 bits."""
    return types.float32(types.uint32), _emit_cast


@intrinsic  # type: ignore[untyped-decorator]
def bits_of(context: Any, number: Any) -> Any:
    """The 32 bits of an fp32 number."""
    return types.uint32(types.float32), _emit_cast


def _emit_cast(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))
