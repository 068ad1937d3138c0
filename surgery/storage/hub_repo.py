"""Repositories of the Hugging Face hub: one commit, listed by huggingface_hub and read in ranges.

    repository(parse("hf://HuggingFaceTB/SmolLM2-135M")).entries["model.safetensors"].size

HF_ENDPOINT and HF_TOKEN are those of huggingface_hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

from surgery.errors import FileError, SurgeryError, printable, show
from surgery.storage.address import Address
from surgery.storage.listing import MOST, Listing
from surgery.storage.refusals import KEYS
from surgery.storage.store import EXTRA, Entry, Store, http_store, needs_client

_TOKEN = f"look at the name and the revision; the token is taken from {KEYS['hf']}"
_NOT_FOUND = "there is no such repository, or it is not to be seen with this token"
# what the hub means by its codes and by statuses -> what is told, and what to do
REFUSALS: Mapping[str | int, tuple[str, str]] = {
    "RepoNotFound": (_NOT_FOUND, _TOKEN),
    "RevisionNotFound": ("the repository has no such branch, tag or whole commit", "look at what stands behind the @"),
    "GatedRepo": ("the repository is for those who accepted its terms", f"accept them on its page; {_TOKEN}"),
    401: ("the hub does not take the token", _TOKEN), 403: ("the token does not allow this", _TOKEN),
    404: (_NOT_FOUND, _TOKEN),
    429: ("the hub is asked too often", f"try again later; more is allowed with a token, from {KEYS['hf']}"),
}  # fmt: skip


def api() -> Any:
    """The hub's own client.  Raises SurgeryError if it is not installed."""
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise SurgeryError("hf:// needs the package huggingface_hub, which is not installed", hint=EXTRA) from None
    return HfApi()


@contextmanager
def said(address: Address) -> Iterator[None]:
    """What the hub's client raises, as a FileError."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    of_client = HfHubHTTPError.__bases__[0]  # what its HTTP library raises, whichever that is
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, HFValidationError):
            raise FileError(printable(str(error), 300), file=str(address)) from None
        raise FileError("the hub's answer is none that its client understands", file=str(address)) from None
    except RuntimeError as error:  # of an upload in a thread
        raise FileError(f"the hub says: {printable(str(error.__cause__ or error), 300)}", file=str(address)) from None
    except (of_client, OSError) as error:
        said, answer = printable(" ".join(str(error).split()), 300), getattr(error, "response", None)
        if answer is None:
            hint = "look at the network, and at HF_ENDPOINT and HF_HUB_OFFLINE if they are set"
            raise FileError(f"the hub cannot be reached: {said}", file=str(address), hint=hint) from None
        codes = (answer.headers.get("x-error-code"), answer.status_code)
        known = next((REFUSALS[code] for code in codes if code in REFUSALS), (f"the hub says: {said}", _TOKEN))
        raise FileError(known[0], file=str(address), hint=known[1]) from None


def commit_of(client: Any, address: Address) -> tuple[str, list[Entry]]:
    """The commit that a repository is at, and all its files.  Raises FileError."""
    kind = "dataset" if address.kind == "datasets" else "model"
    with said(address):
        info = client.repo_info(address.place, revision=address.revision, repo_type=kind, files_metadata=True)
    if not isinstance(info.sha, str) or not re.fullmatch(r"[0-9a-f]{40}", info.sha) or info.siblings is None:
        raise FileError("the hub says neither which commit it is nor what is in it", file=str(address))
    if len(info.siblings) > MOST:
        raise FileError(f"holds more than {MOST} files", file=str(address))
    return info.sha, [_entry(sibling, address) for sibling in info.siblings]


def below(every: Iterable[Entry], address: Address) -> dict[str, Entry]:
    """Those of a repository's files that lie in the folder of an address, by their path in it."""
    skip = len(address.key) + 1 if address.key else 0
    found = (e for e in every if not skip or e.name.startswith(f"{address.key}/"))
    return {e.name[skip:]: Entry(e.name[skip:], e.size, e.etag) for e in found}


def repository(address: Address) -> Listing:
    """The files of a repository, or those below a folder of it, or one file; of the commit that it is at now."""
    return _part(*_whole(address), address)


def first_seen(address: Address) -> Listing:
    """The same at the commit at which this process has seen the repository first, if it had such files then: asking
    anew for each of its files costs time, and hubs count how often they are asked."""
    found = _part(*_first_seen(replace(address, key=""), api().endpoint), address)
    return found if found.entries else repository(address)


def _whole(address: Address) -> tuple[Any, list[Entry]]:
    """The client that reads the commit that a repository is at now, and all files of it."""
    client = api()
    needs_client("hf")
    sha, every = commit_of(client, address)
    prefix = "datasets/" if address.kind == "datasets" else ""
    token = client.token or _token()
    headers = {"authorization": f"Bearer {token}"} if token else None
    return http_store(f"{client.endpoint}/{prefix}{address.place}/resolve/{sha}", headers), every


@lru_cache(maxsize=4)
def _first_seen(address: Address, endpoint: str) -> tuple[Any, list[Entry]]:
    return _whole(address)


def _part(raw: Any, every: Sequence[Entry], address: Address) -> Listing:
    """What of a repository lies at an address."""
    store = Store(address, raw, pinned=True)
    if address.key and (one := [e for e in every if e.name == address.key]):
        return Listing(store, {address.name: Entry(address.name, one[0].size, one[0].etag)}, True)
    return Listing(store, below(every, address))


def _entry(sibling: Any, address: Address) -> Entry:
    """Name, bytes and digest of a file, as the hub lists them."""
    if not isinstance(sibling.rfilename, str) or type(sibling.size) is not int or not 0 <= sibling.size < 1 << 63:
        raise FileError(f"the hub does not say how many bytes {show(sibling.rfilename)} has", file=str(address))
    return Entry(sibling.rfilename, sibling.size, sibling.lfs.sha256 if sibling.lfs else sibling.blob_id)


def _token() -> str | None:
    from huggingface_hub import get_token

    found: str | None = get_token()
    return found
