"""The three changes as one call each, from folder to folder; the command line prepares and carries out the same.

surgery.upcycle("SmolLM2-135M", "moe", experts=64, top_k=8).proof.verdict              # "exact"
surgery.experts("moe", "twice", duplicate=2)
surgery.collapse("moe", "dense").report.content_digest
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surgery.formats.base import Options
from surgery.formats.table import ONE_RANK, Topology
from surgery.running.device import CPU, Device, nobody
from surgery.running.device import device as _device
from surgery.upcycling import run
from surgery.upcycling.collapse import collapsed
from surgery.upcycling.dense_to_moe.settings import settled
from surgery.upcycling.edit_experts.choose import chosen
from surgery.upcycling.edit_experts.selection import Selection, from_values
from surgery.upcycling.run import TOKENS, Outcome, Prepared, carry_out
from surgery.writing import stream
from surgery.writing.staging import check_free

Src = str | os.PathLike[str]


def upcycle(
    src: Src,
    dst: Src,
    *,
    to: str = "hf",
    topology: Topology = ONE_RANK,
    dtype: str = "keep",
    options: Options | None = None,
    max_memory: int | None = None,
    force: bool = False,
    verify: bool = True,
    sync: bool = True,
    verify_tokens: int = TOKENS,
    device: str = "cpu",
    command: Sequence[str] = (),
    progress: stream.Progress | None = None,
    proving: stream.Progress = nobody,
    **settings: Any,
) -> Outcome:
    """Turn a dense checkpoint into a mixture of experts; the other keywords are the fields of `Settings`.

    surgery.upcycle("SmolLM2-135M", "moe", experts=8, top_k=2, strategy="copy")

    dtype is keep, bf16, fp16 or fp32; max_memory is in bytes; device (cpu, cuda, cuda:N) is where the proof runs, and
    the model where the settings need that; progress and proving are told numbers of bytes, of writing and of the
    proof.  Raises SurgeryError; `dst` appears whole, read back and proven as promised, or not at all.
    """
    wanted, on = settled(settings), _device(device)
    check_free(Path(dst), force)
    ready = run.prepare(src, wanted, to=to, topology=topology, dtype=dtype, options=options, max_memory=max_memory,
                        on=on)  # fmt: skip
    return carry_out(ready, dst, verify_tokens=verify_tokens, force=force, verify=verify, sync=sync, command=command,
                     progress=progress, proving=proving)  # fmt: skip


def experts(
    src: Src,
    dst: Src,
    *,
    to: str = "hf",
    topology: Topology = ONE_RANK,
    options: Options | None = None,
    max_memory: int | None = None,
    force: bool = False,
    verify: bool = True,
    sync: bool = True,
    verify_tokens: int = TOKENS,
    device: str = "cpu",
    command: Sequence[str] = (),
    progress: stream.Progress | None = None,
    proving: stream.Progress = nobody,
    **choice: Any,
) -> Outcome:
    """Prune, keep, duplicate, merge or permute the experts of a mixture; the other keywords are a recipe's fields.

    surgery.experts("moe", "fewer", keep=[0, 2], layers={5: {"keep": [1, 3]}}, top_k=1, force_lossy=True)

    The rest is as for `upcycle`.  Raises SurgeryError.
    """
    wanted, on = from_values(choice), _device(device)
    check_free(Path(dst), force)
    ready = prepare_experts(src, wanted, to=to, topology=topology, options=options, max_memory=max_memory, on=on)
    return carry_out(ready, dst, verify_tokens=verify_tokens, force=force, verify=verify, sync=sync, command=command,
                     progress=progress, proving=proving)  # fmt: skip


def collapse(
    src: Src,
    dst: Src,
    *,
    by: str = "exact",
    force_lossy: bool = False,
    to: str = "hf",
    topology: Topology = ONE_RANK,
    options: Options | None = None,
    max_memory: int | None = None,
    force: bool = False,
    verify: bool = True,
    sync: bool = True,
    verify_tokens: int = TOKENS,
    device: str = "cpu",
    command: Sequence[str] = (),
    progress: stream.Progress | None = None,
    proving: stream.Progress = nobody,
) -> Outcome:
    """Turn a mixture back into a dense model: exactly, or with force_lossy by "average" or "by-router".

    surgery.collapse("moe", "dense").proof.verdict          # "exact"

    The rest is as for `upcycle`.  Raises SurgeryError.
    """
    on = _device(device)
    check_free(Path(dst), force)
    ready = prepare_collapse(src, by, force_lossy, to=to, topology=topology, options=options, max_memory=max_memory,
                             on=on)  # fmt: skip
    return carry_out(ready, dst, verify_tokens=verify_tokens, force=force, verify=verify, sync=sync, command=command,
                     progress=progress, proving=proving)  # fmt: skip


def prepare_experts(
    src: Src,
    wanted: Selection,
    *,
    to: str = "hf",
    topology: Topology = ONE_RANK,
    options: Options | None = None,
    max_memory: int | None = None,
    on: Device = CPU,
) -> Prepared:
    """As `run.prepare`, for a change of the experts."""
    return run.prepare_change(src, lambda source: chosen(source, wanted), to=to, topology=topology, options=options,
                              max_memory=max_memory, asked=wanted.to_json(), on=on)  # fmt: skip


def prepare_collapse(
    src: Src,
    by: str = "exact",
    force_lossy: bool = False,
    *,
    to: str = "hf",
    topology: Topology = ONE_RANK,
    options: Options | None = None,
    max_memory: int | None = None,
    on: Device = CPU,
) -> Prepared:
    """As `run.prepare`, for a mixture that becomes dense."""
    return run.prepare_change(src, lambda source: collapsed(source, by, force_lossy, on=on), to=to, topology=topology,
                              options=options, max_memory=max_memory, asked={"collapse": by}, on=on)  # fmt: skip
