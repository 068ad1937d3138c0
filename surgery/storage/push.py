"""Push a folder to a bucket or the hub: each file compared, and nothing seen as a checkpoint before all is there.

    push("SmolLM2-moe", "s3://bucket/moe").verified         # True

A prefix of a bucket is claimed first (`claim.py`) and must be empty.  A push that was killed is gone on with by the
same call; what is there and equal is left.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import has_magic
from pathlib import Path

from surgery.errors import FileError, MismatchError, OutputError, UsageError, show, some
from surgery.settings import Checked, setting, taking
from surgery.storage.address import BUCKETS, Address, is_address, parse
from surgery.storage.card import CARD, card
from surgery.storage.claim import claim, release, standing, taken
from surgery.storage.contents import Item, contents, digest_of, etag_of
from surgery.storage.hub_push import Place, commit, look, message_for
from surgery.storage.listing import MOST, UNFINISHED
from surgery.storage.multipart import abort
from surgery.storage.store import Entry, Store, open_store
from surgery.storage.together import Told, from_threads, together
from surgery.storage.upload import holds, upload
from surgery.tensors.files import File, check_unchanged

FILES = 4  # at a time
Path_ = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Push(Checked):
    """How a folder is pushed.

    supersedes   digests of plans whose unfinished push to the same bucket this one replaces
    progress     is told numbers of bytes: read for their digests, and sent
    """

    card: bool = setting(True, "Add a model card, README.md, if there is none and surgery wrote the folder.")
    message: str | None = setting(None, "The hub: what the commit is called.", metavar="TEXT")
    public: bool = setting(False, "The hub: make a repository that does not exist yet for everybody to see.")
    force: bool = setting(False, "The hub: replace what a repository holds, in the same commit.")
    supersedes: tuple[str, ...] = ()
    progress: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Pushing:
    """What a push would do.

    etags   that a bucket's objects will have, if it computes them as S3 does
    there   the ETags of objects that the place has and that are equal, by the names of files
    hub     the repository, if it is one
    """

    address: Address
    items: tuple[Item, ...]
    etags: Mapping[str, str]
    there: Mapping[str, str | None]
    hub: Place | None = None

    @property
    def bytes(self) -> int:
        return sum(item.size for item in self.items)

    @property
    def bytes_to_send(self) -> int:
        return sum(item.size for item in self.items if item.name not in self.there)


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    files, bytes     of the folder                 sent_files, sent_bytes   of it, that were not there yet
    read_back        files whose ETags are no digests, so that their bytes were compared
    aborted          uploads in parts that were left over
    commit           of the hub
    """

    source: str
    address: str
    files: int
    bytes: int
    sent_files: int
    sent_bytes: int
    read_back: int
    aborted: int
    verified: bool
    seconds: float
    commit: str | None = None
    notes: tuple[str, ...] = field(default=())


@taking(Push)
def push(src: Path_, dst: Path_, request: Push) -> Pushed:
    """Push a folder to an address; every keyword is a flag of `surgery push`.

    surgery.push("SmolLM2-moe", "s3://bucket/moe")

    Raises SurgeryError; a push that did not end is gone on with by the same call.
    """
    return carried_out(prepare(src, dst, request), src, request)


def prepare(src: Path_, dst: Path_, request: Push, sent: Mapping[str, str] | None = None) -> Pushing:
    """Look at the folder and at the place; nothing is written.  `sent`: the ETags of files that are there already.

    Raises SurgeryError if it may not be pushed there.
    """
    if is_address(src) or not is_address(dst):
        raise UsageError("surgery push takes a folder of this machine and an address",
                         hint="surgery push FOLDER s3://BUCKET/PREFIX")  # fmt: skip
    address = destination(dst)
    text = card(Path(src), address.name) if request.card else None
    generated = [(CARD, text)] if text else []
    items = contents(Path(src), generated)
    if address.scheme == "hf":
        place = look(address, items, [name for name, _ in generated], request.force)
        return Pushing(address, tuple(items), {}, dict.fromkeys(place.there), place)
    if odd := [flag for flag in ("message", "public", "force") if getattr(request, flag)]:
        raise UsageError(f"--{odd[0]} is for the hub, not for buckets")
    told = from_threads(request.progress or (lambda n: None))
    here = [item for item in items if item.name not in (sent or {})]
    etags = together(lambda item, stop: etag_of(item, told), here, FILES)
    known = {item.name: etag for item, etag in zip(here, etags, strict=True)} | dict(sent or {})
    plan = Pushing(address, tuple(items), known, {})
    store = open_store(address)
    plan = replace(plan, there=_there(store, plan, request.supersedes))
    check_no_object(store)
    return plan


def destination(dst: Path_) -> Address:
    """An address that can be written to.  Raises UsageError."""
    address = parse(dst)
    if address.scheme not in (*BUCKETS, "hf"):
        raise UsageError(f"{show(str(address))}: only buckets and the hub are written to",
                         hint=f"schemes: {', '.join(f'{s}://' for s in (*BUCKETS, 'hf'))}")  # fmt: skip
    if has_magic(address.key):
        raise UsageError(f"{show(str(address))} would be taken for a pattern by whoever reads it",
                         hint="choose a place without *, ? and [")  # fmt: skip
    return address


def check_no_object(store: Store) -> None:
    """Raise OutputError if a bucket has an object in the place of a folder."""
    if store.address.key and store.head(store.address.key):
        what = "is an object, which a folder of the same name would hide"
        raise OutputError(what, file=str(store.address), hint="choose another place")


def digest(plan: Pushing) -> str:
    """What tells a push from one of other files; of the hub, whose commits need none, nothing."""
    return digest_of(plan.items, [plan.etags.get(item.name, "") for item in plan.items])


def _there(store: Store, plan: Pushing, supersedes: Sequence[str] = ()) -> dict[str, str | None]:
    """The ETags of files that are there already, by name.  Raises OutputError if the place is another's."""
    found = {e.name: e for e in store.list(store.address.key, MOST + 1) if e.name and not e.name.endswith("/")}
    equal = {
        i.name: e.etag
        for i in plan.items
        if (e := found.get(i.name))
        and holds(store, plan.address.below(i.name), i, e, plan.etags[i.name], plan.there.get(i.name))
    }
    names = {item.name for item in plan.items}
    if UNFINISHED in found:
        begun = standing(store)
        if begun and begun.get("plan") not in (digest(plan), *supersedes):
            raise taken(store, begun)
        odd = found.keys() - {UNFINISHED, *names}
    else:
        odd = set() if equal.keys() == found.keys() == names else set(found)
    if odd:
        raise OutputError(f"holds other objects: {some(sorted(odd))}", file=str(store.address),
                          hint="choose another place, or remove what is there")  # fmt: skip
    return equal


def carried_out(plan: Pushing, src: Path_, request: Push) -> Pushed:
    """Push what `prepare` has looked at."""
    began, told = time.monotonic(), request.progress or (lambda n: None)
    if plan.hub:
        todo = [item for item in plan.items if item.name not in plan.there]
        message = message_for(Path(os.path.abspath(src)).name, request.message)
        sha = commit(plan.hub, todo, message, request.public, told) if todo or plan.hub.removed else plan.hub.parent
        return replace(_report(plan, src, began, todo), commit=sha)
    store = open_store(plan.address)
    if len(plan.there) == len(plan.items) and not standing(store):
        return _report(plan, src, began)
    goes_on = claim(store, digest(plan), len(plan.items), plan.bytes, request.supersedes)
    try:  # what came before the claim was made
        plan = replace(plan, there=_there(store, plan, request.supersedes))
    except OutputError:
        if not goes_on:
            release(store)
        raise
    todo = [item for item in plan.items if item.name not in plan.there]
    done: dict[str, tuple[Entry, bool]] = {}
    for rank in sorted({item.rank for item in todo}):
        done |= _uploaded(store, plan, [item for item in todo if item.rank == rank], told)
    check_unchanged({i.source.path: i.source.stamp for i in plan.items if isinstance(i.source, File)})
    aborted, notes = _aborted(store, plan)  # a lost answer to the beginning of an upload leaves one
    _check(store, plan, {name: entry for name, (entry, _) in done.items()})
    release(store)
    read_back = sum(again for _, again in done.values())
    return _report(plan, src, began, todo, read_back, aborted, notes)


def _uploaded(store: Store, plan: Pushing, items: Sequence[Item], told: Told) -> dict[str, tuple[Entry, bool]]:
    """Upload some files, several at a time; if one fails, the others stop at their next part."""
    advance = from_threads(told)

    def one(item: Item, stop: threading.Event) -> tuple[Entry, bool]:
        return upload(store, plan.address.below(item.name), item, plan.etags[item.name], advance, stop)

    return dict(zip([item.name for item in items], together(one, items, FILES), strict=True))


def _aborted(store: Store, plan: Pushing) -> tuple[int, tuple[str, ...]]:
    try:
        return abort(store, {plan.address.below(item.name) for item in plan.items}), ()
    except FileError as error:
        return 0, (f"{error.what} ({error.hint})",)


def _check(store: Store, plan: Pushing, sent: Mapping[str, Entry]) -> None:
    """Compare what the place lists with what was sent, once more and all of it.  Raises MismatchError."""
    found = {e.name: e for e in store.list(plan.address.key, MOST + 1)}
    wrong = [
        item.name
        for item in plan.items
        if (e := found.get(item.name)) is None
        or (e.size, e.etag) != (item.size, sent[item.name].etag if item.name in sent else plan.there[item.name])
    ]
    if wrong:
        raise MismatchError(f"{some(wrong)}: what is there is not what was sent", file=str(plan.address),
                            hint="another program writes there; push again, or choose another place")  # fmt: skip


def _report(
    plan: Pushing, src: Path_, began: float, sent: Sequence[Item] = (), read_back: int = 0, aborted: int = 0,
    notes: tuple[str, ...] = (),
) -> Pushed:  # fmt: skip
    size, seconds = sum(item.size for item in sent), time.monotonic() - began
    return Pushed(os.fspath(src), str(plan.address), len(plan.items), plan.bytes, len(sent), size, read_back, aborted,
                  True, seconds, None, notes)  # fmt: skip
