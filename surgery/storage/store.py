"""One client for all stores, obstore, with what it raises in words.

    store = open_store(parse("s3://bucket/model"))
    store.head("model/config.json").size
    store.fetch("model/x.safetensors", 0, 8, etag)

Keys come from the environment (AWS_*, R2_*, GOOGLE_*, AZURE_*) or, for S3, from whatever boto3 finds: profiles, SSO,
roles.  Without any, S3 buckets are read as anyone may.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import lru_cache
from itertools import islice
from queue import Empty, Queue
from typing import Any, TypeVar

from surgery.errors import FileError, SurgeryError, UsageError, printable, show
from surgery.storage.address import LOCAL, Address
from surgery.storage.refusals import KEYS, WAITS, Busy, Refused, refusal, refused
from surgery.tensors.files import AGAIN

LOG = logging.getLogger(__name__)
_ODD_KEY = re.compile(r'with invalid path: .*?"(.*?)"')
R = TypeVar("R")
T = TypeVar("T")
TRIES = 3  # of a range, beyond what the client itself tries again
Environment = frozenset[tuple[str, str]]
PAGE = 1000  # objects that a store lists by one request
FEWER = "name one checkpoint, not a folder of many"
TIMEOUT = timedelta(seconds=120)  # of one request with its body
SLOW = timedelta(seconds=60)  # that the client goes on trying
EXTRA = "pip install 'checkpoint-surgery[cloud]'"


@dataclass(frozen=True)
class Entry:
    """A file at an address: its path below it, bytes, and what tells this version from others."""

    name: str
    size: int
    etag: str | None
    modified: datetime | None = None


@dataclass(frozen=True)
class Store:
    """An opened client (`raw`, obstore's) of the place of an address.

    pinned   whether addresses name content, so that no ETag is needed
    """

    address: Address
    raw: Any
    pinned: bool = False

    def url(self, key: str) -> str:
        """The address of an object, for messages."""
        return _url(self.address, key)

    def head(self, key: str) -> Entry | None:
        """Size and ETag of an object; None if there is none.  Raises FileError."""
        return self.patiently(lambda: self._head(key))

    def _head(self, key: str) -> Entry | None:
        import obstore

        with self.said(key):
            try:
                return entry_of(obstore.head(self.raw, key), key, self.url(key))
            except (FileNotFoundError, obstore.exceptions.NotFoundError):
                return None

    def _list(self, prefix: str, most: int) -> list[Entry]:
        import obstore

        found: list[Entry] = []
        skip = len(prefix) + 1 if prefix else 0
        with self.said(prefix):
            for chunk in _in_time(obstore.list(self.raw, prefix=prefix or None, chunk_size=PAGE), self.url(prefix)):
                found += [entry_of(meta, str(meta["path"])[skip:], self.url(prefix)) for meta in chunk]
                if len(found) > most:
                    raise FileError(f"holds more than {most} objects", file=self.url(prefix), hint=FEWER)
        return found

    def list(self, prefix: str, most: int) -> list[Entry]:
        """The objects below a prefix, by their path after it.  Raises FileError, also if there are more than `most`."""
        return self._again(lambda: self._list(prefix, most))

    def fetch(self, key: str, start: int, stop: int, version: Entry) -> bytearray:
        """Bytes [start, stop) of one version of an object.  Raises FileError if it is another, or they do not come."""
        return self._again(lambda: self._get(key, start, stop, version))

    def _again(self, ask: Callable[[], R]) -> R:
        """What the client does not try again by itself: an answer whose body is cut."""
        for attempt in range(1, TRIES + 1):
            try:
                return self.patiently(ask)
            except FileError as error:
                if attempt == TRIES or error.hint in (AGAIN, FEWER) or isinstance(error, (Refused, Busy)):
                    raise
        raise AssertionError

    def patiently(self, ask: Callable[[], R]) -> R:
        """The same, asked again for some minutes while the store wants to be asked later.  Raises FileError."""
        for seconds in WAITS:
            try:
                return ask()
            except Busy as error:
                LOG.info("%s: %s; asked again in %d s", error.file, error.what, seconds)
                time.sleep(seconds)
        return ask()

    def some(self, prefix: str) -> Iterator[str]:
        """The first objects below a prefix, by their path after it, by one request.  Raises FileError."""
        import obstore

        with self.said(prefix):
            for chunk in islice(obstore.list(self.raw, prefix=prefix or None, chunk_size=PAGE), 1):
                yield from (str(meta["path"])[len(prefix) :].lstrip("/") for meta in chunk)

    def _get(self, key: str, start: int, stop: int, version: Entry) -> bytearray:
        import obstore

        options: dict[str, Any] = {"range": (start, stop)}
        if version.etag and not self.pinned:
            options["if_match"] = version.etag
        with self.said(key):
            return self._received(obstore.get(self.raw, key, options=options), key, start, stop, version)

    def _received(self, result: Any, key: str, start: int, stop: int, version: Entry) -> bytearray:
        """The bytes of an answer, and no more of it than was asked for."""
        tag = _quoted(result.meta["e_tag"])
        if result.meta["size"] != version.size or (not self.pinned and version.etag and tag and tag != version.etag):
            raise replaced(self.url(key))
        if tuple(result.range) != (start, stop):
            raise FileError(f"bytes {start} to {stop} were asked for, and the server gave {show(str(result.range))}",
                            file=self.url(key), byte=start)  # fmt: skip
        out = bytearray()
        for chunk in result.stream(min_chunk_size=1 << 20):
            if len(out) + len(chunk) > stop - start:
                raise FileError(f"the server sends more than the {stop - start} bytes asked for", file=self.url(key),
                                byte=start)  # fmt: skip
            out += memoryview(chunk)
        if len(out) != stop - start:
            raise FileError(
                f"{len(out)} bytes came where {stop - start} were asked for", file=self.url(key), byte=start
            )
        return out

    def _signed(self) -> bool:
        config = getattr(self.raw, "config", {})
        return not config.get("skip_signature")

    @contextmanager
    def said(self, key: str) -> Iterator[None]:
        """What the client raises, as a FileError that names the address."""
        import obstore.exceptions as wrong

        try:
            yield
        except wrong.PreconditionError:
            raise replaced(self.url(key)) from None
        except (wrong.BaseError, OSError) as error:
            if found := refusal(str(error), _short(error)):
                raise refused(found, self.address.scheme, self.url(key), self._signed()) from None
            if odd := _ODD_KEY.search(str(error)):
                raise Refused(f"holds the key {show(odd[1])}, which names no file", file=self.url(key),
                              hint="name a folder without it") from None  # fmt: skip
            if isinstance(error, (FileNotFoundError, wrong.NotFoundError)):
                raise FileError("does not exist", file=self.url(key)) from None
            hint = "look at the address, the endpoint and the network, then try again"
            hint += f"; keys are taken from {KEYS[self.address.scheme]}" if self.address.scheme in KEYS else ""
            what = f"the store did not answer as it should: {_short(error)}"
            raise FileError(what, file=self.url(key), hint=hint) from None


def _in_time(chunks: Iterable[T], url: str) -> Iterator[T]:
    """What is listed, each piece within a time: the client asks for more for as long as a server says there is more.

    Raises FileError, also for whatever the client raises; a client that goes on asking ends with this process.
    """
    made: Queue[T | BaseException | None] = Queue(1)

    def ask() -> None:
        try:
            for chunk in chunks:
                made.put(chunk)
            made.put(None)
        except BaseException as error:
            made.put(error)

    threading.Thread(target=ask, daemon=True, name="surgery-list").start()
    while True:
        try:
            chunk = made.get(timeout=TIMEOUT.total_seconds())
        except Empty:
            raise FileError("the list of what is there does not end", file=url, hint=FEWER) from None
        if chunk is None:
            return
        if isinstance(chunk, BaseException):
            raise chunk
        yield chunk


def replaced(url: str) -> FileError:
    """Another version of an object than the one that was opened."""
    return FileError("was replaced or removed while it was read", file=url, hint=AGAIN)


def entry_of(meta: Mapping[str, Any], name: str, url: str) -> Entry:
    """What a store says of an object.  Raises FileError if it is nonsense."""
    size = meta["size"]
    if not 0 <= size < 1 << 63:
        raise FileError(f"is said to have {show(size)} bytes", file=url)
    return Entry(name, size, _quoted(meta["e_tag"]), meta["last_modified"])


def _quoted(tag: str | None) -> str | None:
    """An ETag as it is in headers; Azure's lists have it without the quotation marks."""
    return tag if tag is None or tag.endswith('"') else f'"{tag}"'


def _url(address: Address, key: str) -> str:
    return str(Address(address.scheme, address.place, key, address.revision, address.kind))


def _short(error: Exception) -> str:
    """The first line of what went wrong, without what the client was."""
    text = printable(str(error).split("\n\nDebug source")[0])
    text = re.sub(r"\s+", " ", text)
    return text[:300] + ("..." if len(text) > 300 else "")


def needs_client(scheme: str) -> None:
    """Raise SurgeryError unless obstore is installed."""
    try:
        import obstore  # noqa: F401
    except ImportError:
        raise SurgeryError(f"{scheme}:// needs the package obstore, which is not installed", hint=EXTRA) from None


def open_store(address: Address) -> Store:
    """A client of a bucket or a server.  Raises SurgeryError if the environment does not say where it is, or which
    keys there are."""
    needs_client(address.scheme)
    with Store(address, None).said(address.key):
        return Store(address, _opened(replace(address, key=""), environment()))


def environment() -> Environment:
    """What the environment says of stores and their keys."""
    names = ("AWS_", "R2_", "GOOGLE_", "AZURE_", "SURGERY_")
    return frozenset((name, value) for name, value in os.environ.items() if name.startswith(names))


@lru_cache(maxsize=2)  # each keeps connections open
def _opened(address: Address, said: Environment) -> Any:
    """The client of a bucket or a server, made once for what the environment says; finding keys takes a while."""
    return _OPEN[address.scheme](address)


def http_store(url: str, headers: Mapping[str, str] | None = None) -> Any:
    """obstore's client of what lies below a URL."""
    from obstore.store import HTTPStore

    return HTTPStore.from_url(url, client_options=_client(url, headers), retry_config=_retry())


def _client(endpoint: str | None, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
    host = re.sub(r"^http://|[:/].*$", "", endpoint or "") if (endpoint or "").startswith("http://") else None
    plain = host is not None and (LOCAL.fullmatch(host) or os.environ.get("SURGERY_ALLOW_HTTP"))
    found: dict[str, Any] = {"timeout": TIMEOUT, "connect_timeout": timedelta(seconds=20), "allow_http": bool(plain)}
    return {**found, "default_headers": dict(headers)} if headers else found


def _retry() -> dict[str, Any]:
    backoff = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=8), "base": 2}
    return {"max_retries": 6, "retry_timeout": SLOW, "backoff": backoff}


def s3_endpoint(scheme: str) -> str | None:
    """Where the servers of s3:// or r2:// are, None for Amazon's.  Raises UsageError."""
    if scheme == "s3":
        return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    if url := os.environ.get("R2_ENDPOINT_URL"):
        return url
    if account := os.environ.get("R2_ACCOUNT_ID"):
        return f"https://{account}.r2.cloudflarestorage.com"
    raise UsageError("r2:// needs the account", hint=f"keys are taken from {KEYS['r2']}")


def s3_session(scheme: str) -> Any:
    """boto3's session: keys from the environment, profiles, roles."""
    try:
        import boto3
    except ImportError:
        raise SurgeryError(f"{scheme}:// needs the package boto3, which is not installed", hint=EXTRA) from None
    if scheme == "s3":
        return boto3.Session()
    key, secret = os.environ.get("R2_ACCESS_KEY_ID"), os.environ.get("R2_SECRET_ACCESS_KEY")
    if key and secret:
        return boto3.Session(key, secret, region_name="auto")
    return boto3.Session(profile_name=os.environ.get("R2_PROFILE"), region_name="auto")


def _s3(address: Address) -> Any:
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Store

    endpoint, session = s3_endpoint(address.scheme), s3_session(address.scheme)
    more: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
    region = session.region_name or ("auto" if address.scheme == "r2" else "us-east-1")
    if session.get_credentials() is None:
        more["skip_signature"] = True
    else:
        more["credential_provider"] = Boto3CredentialProvider(session)
    return S3Store(address.place, region=region, client_options=_client(endpoint), retry_config=_retry(), **more)


def _gs(address: Address) -> Any:
    from obstore.store import GCSStore

    endpoint = os.environ.get("GOOGLE_BASE_URL")
    return GCSStore(address.place, client_options=_client(endpoint), retry_config=_retry())


def _az(address: Address) -> Any:
    from obstore.store import AzureStore

    if not os.environ.get("AZURE_STORAGE_ACCOUNT_NAME"):
        raise UsageError("az:// needs the account", hint=f"keys are taken from {KEYS['az']}")
    endpoint = os.environ.get("AZURE_STORAGE_ENDPOINT") or os.environ.get("AZURE_ENDPOINT")
    return AzureStore(address.place, client_options=_client(endpoint), retry_config=_retry())


_OPEN: Mapping[str, Callable[[Address], Any]] = {
    "s3": _s3, "r2": _s3, "gs": _gs, "az": _az,
    "https": lambda address: http_store(address.place), "http": lambda address: http_store(address.place),
}  # fmt: skip
