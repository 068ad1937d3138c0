"""Requests: what is asked of every command that writes a checkpoint, and of a conversion.

    request = Convert(to="meta", tp=2, dtype="bf16")
    request.memory                      # bytes: what was asked for, else a quarter of what is free

Fields with a `setting` are flags of the command line as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery.errors import UsageError
from surgery.formats.topology import ONE_RANK, Topology
from surgery.settings import Checked, said, setting
from surgery.units import parse_size

MEMORY = 2 << 30
LEAST = 1 << 16  # bytes that weights may be allowed: below that a run is all calls and no work
DTYPES = ("keep", "bf16", "fp16", "fp32")
ALIASES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}


@dataclass(frozen=True, kw_only=True)
class Write(Checked):
    """How an output is written.

    topology    the parallel sizes of the output, where `tp`, `pp`, `vpp` and `ep` do not say them
    options     choices of the formats, of the source's and of the output's (-O)
    command     what was called, for the record in surgery.json
    progress    is told every number of bytes that was written, or read back
    """

    to: str = setting("hf", "The format to write; see `surgery formats`.", metavar="FORMAT")
    tp: int | None = setting(None, "Tensor-parallel ranks of the output.", low=1, otherwise="1")
    pp: int | None = setting(None, "Pipeline stages of the output; 0: none (neox).", low=0, otherwise="1")
    vpp: int | None = setting(None, "Virtual pipeline chunks per stage of the output.", low=1, otherwise="1")
    ep: int | None = setting(None, "Expert-parallel ranks of the output.", low=1, otherwise="1")
    topology: Topology = ONE_RANK
    options: Mapping[str, str] | None = None
    max_memory: int | None = setting(
        None, "Memory for weights, e.g. 512MiB; the result is the same.", metavar="SIZE", low=LEAST,
        otherwise="a quarter of what is free, at most 2GiB",
    )  # fmt: skip
    tokenizer: str | os.PathLike[str] | None = setting(
        None, "Take the tokenizer from this file or folder instead.", metavar="PATH"
    )
    force: bool = setting(
        False, "Replace an existing output or checkpoint, once the new one is complete; never a folder of other files."
    )
    verify: bool = setting(True, "Read the output back and compare it before it appears.")
    sync: bool = setting(True, "Wait until the disk has the output: without it sooner done, and spoilt by a power cut.")
    command: Sequence[str] = ()
    progress: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        """Sizes may be texts; parallel sizes become the topology."""
        size: object = self.max_memory
        if isinstance(size, str):
            object.__setattr__(self, "max_memory", parse_size(size, LEAST))
        super().__post_init__()
        if self.to:
            from surgery.formats.registry import named

            object.__setattr__(self, "to", named(self.to).name)
        given = {name: n for name in ("tp", "pp", "vpp", "ep") if (n := getattr(self, name)) is not None}
        if not given:
            return
        if self.topology != ONE_RANK:
            raise UsageError("parallel sizes are said twice: as topology, and one by one")
        object.__setattr__(self, "topology", Topology(**given))
        for name in given:  # what is made of this request by `replace` says them once
            object.__setattr__(self, name, None)

    @property
    def memory(self) -> int:
        """Bytes that weights may take."""
        return self.max_memory or default_memory()


@dataclass(frozen=True, kw_only=True)
class Divided(Write):
    """An output that several processes may write."""

    workers: int = setting(1, "Processes that write; each has its part of the memory.", metavar="N", low=1, high=4096)
    engine: str = setting(
        "processes", "What runs them: processes of this machine, or a Ray cluster (RAY_ADDRESS).",
        choices=("processes", "ray"),
    )  # fmt: skip
    shard: str | None = setting(
        None, "Write only share I of N, from 0, of the files, in any order and on any machine; the last one puts all "
        "together.", metavar="I/N",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard and self.workers > 1:
            raise UsageError("--shard and --workers exclude each other")


def dtype_setting() -> Any:
    """The field `dtype`, of those requests that cast."""
    return setting("keep", "Cast the weights before anything else; by default every bit is kept.", choices=DTYPES,
                   aliases=ALIASES)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Save(Write):
    """A checkpoint that was opened is written, with other tensors for some of its parts."""

    to: str = setting("", "The format to write.", metavar="FORMAT", otherwise="that which it was read from")
    parts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Convert(Divided):
    """A conversion."""

    to: str = field(metadata=said("The format to write; see `surgery formats`.", metavar="FORMAT"))
    from_: str | None = setting(
        None, "The source's format.", metavar="FORMAT", flag="from", otherwise="it is recognised"
    )
    dtype: str = dtype_setting()
    vocab_size: int | None = setting(None, "Cut padding rows of the vocabulary, or add rows of zeros.", low=1)
    optimizer: bool = setting(
        False, "Carry Adam's state too: fp32 masters, both moments, the number of steps. Without it the output is "
        "weights alone, and a run that goes on from them starts its optimizer anew.",
    )  # fmt: skip
    allow: Collection[str] = setting(
        (), "Leave this out if the target cannot hold it; refused where the logits depend on it. NAME: qkv_bias, "
        "o_bias, mlp_bias, router_bias, norm_bias (only zeros), norm_weight (only ones), windows (none shorter than "
        "the context). Repeatable.", metavar="NAME", many=True,
    )  # fmt: skip


def default_memory() -> int:
    """A quarter of the machine's free memory, at most 2 GiB."""
    from surgery.tensors.memory import free_memory

    free = free_memory()
    return MEMORY // 4 if free is None else max(64 << 20, min(MEMORY, free // 4))
