"""Convert a checkpoint of any format into any other: open, plan, stream, read back, publish.

    report = convert("SmolLM2-135M", "SmolLM2-meta", to="meta", topology=Topology(tp=3))
    report.verified, report.content_digest

Each byte is read once and written once.  Digests of the parts are computed on the way; the output is then opened
like any other checkpoint, read, and must give the same digests, before it appears under its name.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import surgery
from surgery.containers.output import OutputFile, text_file
from surgery.conversion import allow, state
from surgery.conversion.numbers import remarks
from surgery.conversion.report import Plan, Report, Share, provenance, states_of
from surgery.conversion.request import Convert, Divided, Write
from surgery.conversion.workers import ENGINES, Task
from surgery.errors import ConfigError, OutputError, UsageError, show, shown, some
from surgery.formats.base import ALLOW_UNKNOWN, PROVENANCE, Checkpoint, Format, Options
from surgery.formats.operations import DTYPES, to_dtype, to_vocab, with_rows, with_tokenizer
from surgery.formats.padding import padding_notes
from surgery.formats.registry import by_side, format_of, named, open_checkpoint
from surgery.formats.topology import Topology
from surgery.formats.unknown import ALL
from surgery.model.wording import in_words
from surgery.settings import taking
from surgery.storage.outgoing import outgoing
from surgery.tensors.files import check_unchanged
from surgery.tensors.fingerprint import SOURCE, Ledger
from surgery.units import human
from surgery.writing import stream
from surgery.writing.locking import BUSY
from surgery.writing.readback import Spoilt
from surgery.writing.shards import Shard, others
from surgery.writing.staging import check_free, data_of, has_begun

LOG = logging.getLogger(__name__)
Prove = Callable[[Checkpoint], Mapping[str, Any]]
Path_ = str | os.PathLike[str]
D = TypeVar("D", bound=Divided)


@taking(Convert)
def convert(src: Path_, dst: Path_, request: Convert) -> Report:
    """Write the checkpoint `src` as `dst` in another format; every keyword is a flag of `surgery convert`.

    surgery.convert("Llama-2-7b", "Llama-2-7b-hf", to="hf", dtype="bf16")

    `dst` appears whole or not at all, and a run that was killed goes on when it is repeated; it may be an address.
    Raises SurgeryError; nothing half-written is left under `dst`.
    """
    with outgoing(dst, request) as place:
        check_free(place, request.force)
        return whole(carried_out(prepare(src, request), place, request, task_of(src, place, request)))


def task_of(src: Path_, dst: Path_, request: Convert) -> Task:
    """What each of several processes does."""
    return partial(_share, os.fspath(src), os.fspath(dst), request_of_share(request))


def _share(src: str, dst: str, request: Convert, shard: Shard, progress: stream.Progress) -> None:
    write_share(prepare(src, request), dst, shard, progress)


def prepare(src: Path_, request: Convert) -> Plan:
    """Open the source and plan the output; nothing is written.  Raises SurgeryError if it cannot be done."""
    target, origin = named(request.to), format_of(src, request.from_)
    check_flags(target, request.topology)
    reading, writing = by_side(request.options or {}, [origin], target)
    source = open_checkpoint(src, format=origin.name, options=reading, optimizer=request.optimizer)
    if request.optimizer:
        state.check(source, origin, target)
    if request.tokenizer is not None:
        source = with_tokenizer(source, request.tokenizer)
    allow.check_names(request.allow, source)
    plan = partial(_plan, request=request, reading=reading, writing=writing)
    try:
        return plan(source)
    except ConfigError as error:
        slim = allow.without(source, request.allow, error, plan)
    return plan(slim, cut=slim.parts.keys() != source.parts.keys())


def _plan(source: Checkpoint, request: Convert, reading: Options, writing: Options, cut: bool = False) -> Plan:
    """The plan of a conversion, cast and with another vocabulary as was asked."""
    ledger, written_from = Ledger(numbers=True), source.parts
    source = state.prepared(source, named(request.to), request.dtype)
    if request.vocab_size is not None:
        source = to_vocab(source, request.vocab_size)
    if request.dtype != "keep":
        # rows that are cut are never read, and masters may be read in place of weights: then the source has no digest
        if request.vocab_size is None and not request.optimizer:
            parts = {name: ledger.tap(SOURCE + name, part) for name, part in source.parts.items()}
            source = replace(source, parts=parts)
        source = to_dtype(source, DTYPES[request.dtype])
    asked = {"read": reading, "dtype": request.dtype,
             "allow": sorted(request.allow), "vocab_size": request.vocab_size, "cut": cut,
             "optimizer": request.optimizer}  # fmt: skip
    derived = cut or (request.optimizer and source.parts != written_from) or request.vocab_size is not None
    return plan_for(source, request, options=writing, job=asked, derived=derived, ledger=ledger)


def plan_for(
    source: Checkpoint,
    write: Write,
    *,
    options: Options | None = None,
    job: Mapping[str, Any] | None = None,
    derived: bool = True,
    ledger: Ledger | None = None,
) -> Plan:
    """Plan the output of a checkpoint that is open, or was made from others (upcycled, merged, trained).

    options   of the target; by default those of `write`    job      whatever else tells this job from another one
    derived   whether the weights are others than those of the files that `source` names
    """
    target, ledger = named(write.to), ledger or Ledger(numbers=True)
    check_flags(target, write.topology)
    if write.tokenizer is not None:
        source = with_tokenizer(source, write.tokenizer)
    given = dict((write.options or {}) if options is None else options)
    by_side(given, [], target)
    if source.optimizer is None and (idle := [o.name for o in target.choices if o.of_optimizer and o.name in given]):
        raise UsageError(f"-O {some(idle)}: no state of an optimizer is carried here",
                         hint="leave it out, or convert with --optimizer")  # fmt: skip
    tapped = replace(source, parts={name: ledger.tap(name, part) for name, part in source.parts.items()},
                     optimizer=state.tapped(source, target, ledger))  # fmt: skip
    output = target.plan(tapped, write.topology, target.with_defaults(given, "write"))
    notes = tuple(dict.fromkeys([*source.notes, *padding_notes(source), *_lost_facts(source, target), *output.notes]))
    everything = {**(job or {}), "to": write.to, "topology": asdict(write.topology), "write": given,
                  "tokenizer": write.tokenizer and os.fspath(write.tokenizer)}  # fmt: skip
    return Plan(source, output, target, write, given, ledger, write.memory, notes, everything, derived)


def check_flags(target: Format, topology: Topology) -> None:
    """Raise UsageError for a parallel size that the format does not have."""
    if not isinstance(topology, Topology):
        raise UsageError(f"topology must be a surgery.Topology, not {show(topology)}")
    odd = [
        f"--{name} {n}"
        for name, n in asdict(topology).items()
        if isinstance(n, int) and n != 1 and name not in (target.flags if n > 0 else target.zero)
    ]
    if odd:
        has = ", ".join(f"--{name}" for name in target.flags) or "no parallel sizes"
        raise UsageError(f"{target.name} checkpoints have no {some(odd)}", hint=f"{target.name} has {has}")


def _lost_facts(source: Checkpoint, target: Format) -> list[str]:
    """Config keys that only Hugging Face's config.json has a place for."""
    if target.name == "hf" or not source.facts:
        return []
    keys = [
        k
        for k, v in source.facts.items()
        if v is not None and k not in ("architectures", "transformers_version", "torch_dtype", "dtype")
    ]
    return (
        [f"{target.name} has no place for these config keys, which do not change the logits: {some(keys, 20)}"]
        if keys
        else []
    )


def execute(
    plan: Plan, dst: Path_, *, progress: stream.Progress | None = None, prove: Prove | None = None, shards: int = 0
) -> Report:
    """Carry out a plan; of `shards` shares that other processes wrote, only what is missing is written.

    `progress` takes the place of the request's.  `prove`, by default the plan's, is shown the complete output, opened,
    before it is published: what it answers joins surgery.json, and if it raises, the output does not appear.
    """
    import torch  # noqa: F401  imported before the peak is measured, which is above the imports

    dst, write, progress, prove = Path(dst), plan.write, progress or plan.write.progress, prove or plan.prove
    refuse_overlap(plan.source.path, dst)
    report: list[Report] = []

    def close(written: stream.Written) -> list[OutputFile]:
        digest, began = _digests(plan), time.monotonic()
        LOG.debug("wrote all files of %s; reading them back: %s", dst, bool(write.verify or prove))
        again = _again(plan, dst) if write.verify or prove else None
        if write.verify and again:
            _read_back(plan, again, dst, progress)
        seconds = time.monotonic() - began if write.verify else 0.0
        proof = prove(again) if prove and again else {}
        check_unchanged(plan.source.stamps)
        report.append(_report(plan, dst, written, digest, seconds))
        return [text_file(PROVENANCE, provenance(plan, report[0], proof))]

    LOG.debug("writing %s as %s: %d files, %s, with %s of memory", dst, plan.to.name, len(plan.output.files),
              human(plan.bytes), human(plan.max_memory))  # fmt: skip
    done = stream.write(plan.output.files, dst, max_memory=plan.max_memory, job=job_of(plan), ledger=plan.ledger,
                        progress=progress, force=write.force, durable=write.sync, threads=plan.threads,
                        closing=close, compare=write.verify, shards=shards)  # fmt: skip
    LOG.debug("published %s after %.1f s", dst, done.seconds)
    first = report[0]
    peak, seconds = (first.peak_memory, first.seconds) if prove else (done.peak, done.seconds)  # those of writing
    return replace(first, bytes=done.bytes, seconds=seconds, read_bytes=done.read_bytes, peak_memory=peak,
                   notes=(*first.notes, *done.notes))  # fmt: skip


def carried_out(
    plan: Plan, dst: Path_, request: Divided, task: Task, progress: stream.Progress | None = None
) -> Report | Share:
    """Carry out a plan by as many processes as the request says, or one share of it.  `task` writes a share."""
    dst = Path(dst)
    refuse_overlap(plan.source.path, dst)
    if request.shard:
        return _one_share(plan, dst, Shard.parse(request.shard), progress)
    if request.workers > 1 and not has_begun(dst):  # once putting together has begun, one process ends it
        todo = [Shard(i, request.workers) for i in range(request.workers)]
        ENGINES[request.engine](task, todo, dst, progress or (lambda n: None))
    return execute(plan, dst, progress=progress, shards=request.workers if request.workers > 1 else 0)


def whole(done: Report | Share) -> Report:
    """Raises UsageError for a share, whose missing ones nobody waits for."""
    if isinstance(done, Share):
        raise UsageError(f"share {done.index} of {done.count} is written, and no output yet",
                         hint="surgery convert --shard, or workers=N, which waits for all")  # fmt: skip
    return done


def request_of_share(request: D) -> D:
    """The request of one of several processes: its part of the memory."""
    return replace(request, max_memory=max(1, request.memory // request.workers), progress=None, workers=1)


def write_share(plan: Plan, dst: Path_, shard: Shard, progress: stream.Progress | None = None) -> None:
    """Write one share of a plan beside the output.  Raises SurgeryError."""
    threads = plan.threads or max(1, min(4, (os.cpu_count() or 1) // shard.count))
    stream.write_shard(plan.output.files, Path(dst), shard, max_memory=plan.max_memory, job=job_of(plan),
                       ledger=plan.ledger, progress=progress, durable=plan.write.sync, threads=threads)  # fmt: skip


def _one_share(plan: Plan, dst: Path, shard: Shard, progress: stream.Progress | None) -> Report | Share:
    """Write a share, and put all of them together if it is the last one."""
    if not has_begun(dst):
        write_share(plan, dst, shard, progress)
        missing = others(dst, shard, plan.output.files)
        if missing:
            published = os.path.lexists(dst) and not plan.write.force  # by another that was as late
            return Share(shard.index, shard.count, () if published else tuple(other.index for other in missing))
    try:
        return execute(plan, dst, progress=progress, shards=shard.count)
    except OutputError as error:
        if error.what != BUSY:
            raise
        return Share(shard.index, shard.count, ())


def job_of(plan: Plan) -> dict[str, Any]:
    """What tells this output from any other."""
    return {"surgery": surgery.__version__, "source": identity(plan.source), **plan.job}


def refuse_overlap(src: Path, dst: Path) -> None:
    """Raise OutputError if one of two folders lies in the other."""
    a, b = src.resolve(), dst.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise OutputError(f"and the source {src} lie within each other", file=dst, hint="write to a folder beside it")


def _again(plan: Plan, dst: Path) -> Checkpoint:
    """What was written, opened as any reader would."""
    options = {**plan.to.reading(plan.options), ALLOW_UNKNOWN.name: ALL}
    return plan.to.open(data_of(dst), options, plan.source.optimizer is not None)


def _read_back(plan: Plan, again: Checkpoint, dst: Path, progress: stream.Progress | None) -> None:
    """Compare the digests of all parts of what was written with those of what should have been."""
    ledger, rows = Ledger(), plan.source.spec.vocab
    if again.spec.vocab > rows:  # those that the target pads its vocabulary with are its own
        again = with_rows(again, rows)
    state.compare(plan.source.optimizer, again.optimizer, dst)
    stream.read_through({**again.parts, **states_of(again, plan.to)}, ledger, plan.max_memory, progress)
    ours, theirs = plan.ledger, ledger
    mine = [n for n in ours.parts if not n.startswith(SOURCE)]
    wrong = [n for n in mine if n not in theirs.parts or ours.fingerprint(n) != theirs.fingerprint(n)]
    wrong += [n for n in theirs.parts if n not in ours.parts]
    if wrong:
        raise Spoilt(
            f"{len(wrong)} parts read back differently from what was written: {some(wrong)}",
            file=dst,
            hint="the disk or the memory is faulty, or this is a mistake in surgery; the output was not published",
        )
    if changed := plan.source.spec.changes(again.spec):
        raise ConfigError(f"the written config means another model: {in_words(changed)}", file=dst)


def identity(source: Checkpoint) -> list[Any]:
    """What tells whether the source is still the same when a killed run is repeated.

    The number of the device is not in it: every machine that mounts a file system has its own.
    """
    return [[os.path.realpath(path), *stamp[1:]] for path, stamp in sorted(source.stamps.items())]


def _digests(plan: Plan) -> tuple[str | None, str]:
    """Of the source and of the output: the same one if no weight was changed, none if the source is another model."""
    output = plan.ledger.content_digest()
    if plan.derived:
        return None, output
    cast = any(name.startswith(SOURCE) for name in plan.ledger.parts)
    return (plan.ledger.content_digest(SOURCE) if cast else output), output


def _report(
    plan: Plan, dst: Path, written: stream.Written, digests: tuple[str | None, str], verify_seconds: float
) -> Report:
    return Report(
        source=shown(plan.source.path),
        source_format=plan.source.format,
        output=shown(dst),
        output_format=plan.to.name,
        topology=plan.parallel,
        files=len(plan.output.files) + 1,
        bytes=written.bytes,
        read_bytes=written.read_bytes,
        resumed_bytes=written.resumed_bytes,
        seconds=written.seconds,
        verify_seconds=verify_seconds,
        peak_memory=written.peak,
        max_memory=plan.max_memory,
        source_digest=digests[0],
        content_digest=digests[1],
        verified=plan.write.verify,
        dropped=dict(plan.source.ignored),
        notes=(*plan.notes, *remarks(plan.ledger, plan.source.parts)),
    )
