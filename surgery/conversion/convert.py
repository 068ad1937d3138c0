"""Convert a checkpoint of any format into any other: open, plan, stream, read back, publish.

    report = convert("SmolLM2-135M", "SmolLM2-meta", to="meta", topology=Topology(tp=3))
    report.verified, report.content_digest

Each byte is read once and written once.  Digests of the parts are computed on the way; the output is then opened
like any other checkpoint, read, and must give the same digests, before it appears under its name.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from surgery.containers.output import OutputFile, text_file
from surgery.conversion import allowances
from surgery.conversion.provenance import provenance, version
from surgery.errors import ConfigError, MismatchError, OutputError, UsageError, some
from surgery.formats.base import PROVENANCE, Checkpoint, Format, Options, Output
from surgery.formats.operations import DTYPES, to_dtype, to_vocab, with_rows, with_tokenizer
from surgery.formats.registry import FORMATS, open_checkpoint, recognise
from surgery.formats.table import ONE_RANK, Topology
from surgery.model.wording import in_words
from surgery.tensors.fingerprint import SOURCE, Ledger
from surgery.writing import stream
from surgery.writing.staging import check_free, data_of

MEMORY = 2 << 30
Prove = Callable[[Checkpoint], Mapping[str, Any]]


@dataclass(frozen=True)
class Plan:
    """What a conversion would do.  Sizes in bytes; `dropped` maps tensors of the source to why they are left out."""

    source: Checkpoint
    output: Output
    to: Format
    topology: Topology
    ledger: Ledger
    max_memory: int
    dropped: Mapping[str, str]
    notes: tuple[str, ...]
    options: Options = field(default_factory=dict)  # of the target
    settings: Mapping[str, Any] = field(default_factory=dict)  # what was asked for: an equal job may be resumed
    threads: int | None = None  # that make what is written; None: as many as there are cores, at most 4

    @property
    def bytes(self) -> int:
        return sum(f.size for f in self.output.files)


@dataclass(frozen=True)
class Report:
    """What a conversion did.  Digests are of the model's parts: equal for the same weights in any format."""

    source: str
    source_format: str
    output: str
    output_format: str
    topology: Mapping[str, int]
    files: int
    bytes: int
    read_bytes: int
    resumed_bytes: int
    seconds: float
    verify_seconds: float
    peak_memory: int
    max_memory: int
    source_digest: str | None
    content_digest: str
    verified: bool
    dropped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def prepare(
    src: str | os.PathLike[str],
    *,
    to: str,
    from_: str | None = None,
    topology: Topology = ONE_RANK,
    dtype: str = "keep",
    vocab_size: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    options: Options | None = None,
    max_memory: int | None = None,
    allow: Collection[str] = (),
) -> Plan:
    """Open the source and plan the output; nothing is written.  Raises SurgeryError if it cannot be done."""
    if to not in FORMATS:
        raise UsageError(f"there is no format {to!r}", hint=f"known formats: {', '.join(FORMATS)}")
    target = FORMATS[to]
    check_flags(target, topology)
    reading, writing = _split(src, from_, target, options or {})
    source = open_checkpoint(src, format=from_, options=reading)
    if tokenizer is not None:
        source = with_tokenizer(source, tokenizer)
    settings = {"read": reading, "tokenizer": None if tokenizer is None else str(tokenizer)}
    return plan_for(
        source, to=to, topology=topology, dtype=dtype, vocab_size=vocab_size, options=writing, max_memory=max_memory,
        settings=settings, allow=allow,
    )  # fmt: skip


def plan_for(
    source: Checkpoint,
    *,
    to: str,
    topology: Topology = ONE_RANK,
    dtype: str = "keep",
    vocab_size: int | None = None,
    options: Options | None = None,
    max_memory: int | None = None,
    settings: Mapping[str, Any] | None = None,
    allow: Collection[str] = (),
) -> Plan:
    """Plan the output of a checkpoint that is open, or was made from others (upcycled, merged).

    `options` are the target's; `settings` is whatever else tells this job from another one.  `allow` names what is
    left out if the target cannot hold it and the logits do not depend on it (`allowances.RULES`).
    """
    more = {**(settings or {}), "allow": sorted(allow)}

    def plan(checkpoint: Checkpoint) -> Plan:
        return _plan(checkpoint, to, topology, dtype, vocab_size, options, max_memory, more)

    allowances.check_names(allow, source)
    try:
        return plan(source)
    except ConfigError as error:
        slim = allowances.without(source, allow, error, plan)
    cut = slim.parts.keys() != source.parts.keys()
    return _plan(slim, to, topology, dtype, vocab_size, options, max_memory, {**more, "cut": cut})


def _plan(
    source: Checkpoint, to: str, topology: Topology, dtype: str, vocab_size: int | None, options: Options | None,
    max_memory: int | None, settings: Mapping[str, Any],
) -> Plan:  # fmt: skip
    if to not in FORMATS:
        raise UsageError(f"there is no format {to!r}", hint=f"known formats: {', '.join(FORMATS)}")
    target, writing = FORMATS[to], dict(options or {})
    check_flags(target, topology)
    if unknown := writing.keys() - target.option_names("write"):
        raise UsageError(f"writing {to} has no option {some(sorted(unknown))}", hint=f"surgery formats {to}")
    ledger = Ledger()
    if vocab_size is not None:
        source = to_vocab(source, vocab_size)
    if dtype != "keep":
        if vocab_size is None:  # rows that are cut are never read, so the source as a whole has no digest then
            parts = {name: ledger.tap(SOURCE + name, part) for name, part in source.parts.items()}
            source = replace(source, parts=parts)
        source = to_dtype(source, DTYPES[dtype])
    tapped = replace(source, parts={name: ledger.tap(name, part) for name, part in source.parts.items()})
    output = target.plan(tapped, topology, target.with_defaults(writing, "write"))
    lost = _lost_facts(source, target)
    notes = tuple(dict.fromkeys([*source.notes, *lost, *output.notes]))
    asked = {"to": to, "topology": asdict(topology), "dtype": dtype, "vocab_size": vocab_size, "write": writing}
    memory = max_memory or default_memory()
    return Plan(source, output, target, topology, ledger, memory, source.ignored, notes, writing, {**settings, **asked})


def check_flags(target: Format, topology: Topology) -> None:
    """Raise UsageError for a parallel size that the format does not have."""
    odd = [
        f"--{name} {n}"
        for name, n in asdict(topology).items()
        if isinstance(n, int) and n != 1 and name not in (target.flags if n > 0 else target.zero)
    ]
    if odd:
        has = ", ".join(f"--{name}" for name in target.flags) or "no parallel sizes"
        raise UsageError(f"{target.name} checkpoints have no {some(odd)}", hint=f"{target.name} has {has}")


def _split(
    src: str | os.PathLike[str], from_: str | None, target: Format, options: Options
) -> tuple[dict[str, str], dict[str, str]]:
    """Options for the source's format and for the target's; one that neither has is an error."""
    source = FORMATS[from_] if from_ is not None and from_ in FORMATS else recognise(src)
    reads, writes = source.option_names("read"), target.option_names("write")
    unknown = [name for name in options if name not in reads | writes]
    if unknown:
        raise UsageError(f"neither reading {source.name} nor writing {target.name} has an option {some(unknown)}",
                         hint="`surgery formats` lists the options of every format")  # fmt: skip
    return ({k: v for k, v in options.items() if k in reads}, {k: v for k, v in options.items() if k in writes})


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


def default_memory() -> int:
    """A quarter of the machine's free memory, at most 2 GiB."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return max(64 << 20, min(MEMORY, int(line.split()[1]) * 1024 // 4))
    except OSError:
        pass
    return MEMORY // 4


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    to: str,
    from_: str | None = None,
    topology: Topology = ONE_RANK,
    dtype: str = "keep",
    vocab_size: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    options: Options | None = None,
    max_memory: int | None = None,
    force: bool = False,
    verify: bool = True,
    sync: bool = True,
    allow: Collection[str] = (),
    command: Sequence[str] = (),
    progress: stream.Progress | None = None,
) -> Report:
    """Write `src` as `dst` in the format `to`; every keyword is a flag of `surgery convert`.

    dtype is keep, bf16, fp16 or fp32; max_memory is in bytes.  `dst` appears whole or not at all, and a run that
    was killed goes on when it is repeated.  Raises SurgeryError; nothing half-written is left under `dst`.
    """
    check_free(Path(dst), force)
    plan = prepare(
        src, to=to, from_=from_, topology=topology, dtype=dtype, vocab_size=vocab_size, tokenizer=tokenizer,
        options=options, max_memory=max_memory, allow=allow,
    )  # fmt: skip
    return execute(plan, dst, force=force, verify=verify, sync=sync, command=command, progress=progress)


def execute(
    plan: Plan,
    dst: str | os.PathLike[str],
    *,
    force: bool = False,
    verify: bool = True,
    sync: bool = True,
    command: Sequence[str] = (),
    progress: stream.Progress | None = None,
    prove: Prove | None = None,
) -> Report:
    """Carry out a plan.

    sync=False leaves it to the system when the output is on disk: sooner done, but a power cut may spoil it.
    `prove` is shown the complete output, opened, before it is published: what it answers joins surgery.json, and if it
    raises, the output does not appear.
    """
    import torch  # noqa: F401  imported before the peak is measured, which is above the imports

    dst = Path(dst)
    refuse_overlap(plan.source.path, dst)
    report: list[Report] = []

    def close(written: stream.Written) -> list[OutputFile]:
        digest, began = _digests(plan), time.monotonic()
        again = _again(plan, dst) if verify or prove else None
        if verify and again:
            _read_back(plan, again, dst, progress)
        seconds = time.monotonic() - began if verify else 0.0
        proof = prove(again) if prove and again else {}
        report.append(_report(plan, dst, written, digest, verify, seconds))
        return [text_file(PROVENANCE, provenance(plan, report[0], command, proof))]

    job = {"surgery": version(), "source": identity(plan.source), **plan.settings}
    done = stream.write(plan.output.files, dst, max_memory=plan.max_memory, job=job, ledger=plan.ledger,
                        progress=progress, force=force, durable=sync, threads=plan.threads, closing=close)  # fmt: skip
    first = report[0]
    peak, seconds = (first.peak_memory, first.seconds) if prove else (done.peak, done.seconds)  # those of writing
    return replace(first, bytes=done.bytes, seconds=seconds, read_bytes=done.read_bytes, peak_memory=peak,
                   notes=(*first.notes, *done.notes))  # fmt: skip


def refuse_overlap(src: Path, dst: Path) -> None:
    """Raise OutputError if one of two folders lies in the other."""
    a, b = src.resolve(), dst.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise OutputError(f"and the source {src} lie within each other", file=dst, hint="write to a folder beside it")


def _again(plan: Plan, dst: Path) -> Checkpoint:
    """What was written, opened as any reader would."""
    return plan.to.open(data_of(dst), plan.to.reading(plan.options))


def _read_back(plan: Plan, again: Checkpoint, dst: Path, progress: stream.Progress | None) -> None:
    """Compare the digests of all parts of what was written with those of what should have been."""
    ledger, rows = Ledger(), plan.source.spec.vocab
    if again.spec.vocab > rows:  # those that the target pads its vocabulary with are its own
        again = with_rows(again, rows)
    stream.read_through(again.parts, ledger, plan.max_memory, progress)
    ours, theirs = plan.ledger, ledger
    mine = [n for n in ours.parts if not n.startswith(SOURCE)]
    wrong = [n for n in mine if n not in theirs.parts or ours.fingerprint(n) != theirs.fingerprint(n)]
    wrong += [n for n in theirs.parts if n not in ours.parts]
    if wrong:
        raise MismatchError(
            f"{len(wrong)} parts read back differently from what was written: {some(wrong)}",
            file=dst,
            hint="the disk or the memory is faulty, or this is a mistake in surgery; the output was not published",
        )
    if changed := plan.source.spec.changes(again.spec):
        raise ConfigError(f"the written config means another model: {in_words(changed)}", file=dst)


def identity(source: Checkpoint) -> list[Any]:
    """What tells whether the source is still the same when a killed run is repeated."""
    stats = [(p, p.stat()) for p in (*source.files, *source.configs)]
    return [[str(p.resolve()), s.st_size, s.st_mtime_ns] for p, s in stats]


def _digests(plan: Plan) -> tuple[str | None, str]:
    """Of the source and of the output: the same one if no weight was changed, none if the source is another model."""
    output = plan.ledger.content_digest()
    if plan.settings.get("cut") or plan.settings.get("derived"):
        return None, output
    if any(name.startswith(SOURCE) for name in plan.ledger.parts):
        return plan.ledger.content_digest(SOURCE), output
    other = plan.settings.get("vocab_size") or plan.settings.get("derived")  # cut, or made from several
    return (None if other else output), output


def _report(
    plan: Plan, dst: Path, written: stream.Written, digests: tuple[str | None, str], verified: bool, seconds: float
) -> Report:
    return Report(
        source=str(plan.source.path),
        source_format=plan.source.format,
        output=str(dst),
        output_format=plan.to.name,
        topology={name: getattr(plan.topology, name) for name in plan.to.flags},
        files=len(plan.output.files) + 1,
        bytes=written.bytes,
        read_bytes=written.read_bytes,
        resumed_bytes=written.resumed_bytes,
        seconds=written.seconds,
        verify_seconds=seconds,
        peak_memory=written.peak,
        max_memory=plan.max_memory,
        source_digest=digests[0],
        content_digest=digests[1],
        verified=verified,
        dropped=dict(plan.dropped),
        notes=plan.notes,
    )
