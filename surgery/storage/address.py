"""Addresses of checkpoints: s3://, r2://, gs://, az://, https:// and hf://.

parse("s3://bucket/runs/step1000").key          # "runs/step1000"
is_address("s3:/bucket/x")                      # True: what becomes of it as a Path
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from surgery.errors import UsageError, show

BUCKETS = ("s3", "r2", "gs", "az")
SCHEMES = (*BUCKETS, "https", "http", "hf")
# R2 buckets that anyone may read, and where (github.com/allenai/OLMo, README.md)
PUBLIC: Mapping[str, str] = {"olmo-data": "https://olmo-data.org"}
LOCAL = re.compile(r"localhost|127(\.\d{1,3}){3}|\[?::1\]?")
_SHAPE = re.compile(rf"({'|'.join(SCHEMES)}):/{{1,2}}([^/].*)", re.I | re.S)
_REPO = re.compile(
    r"(?:(?P<kind>models|datasets)/)?(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/]+))?(?:/(?P<path>.*))?"
)
_PAGE = re.compile(r"(?:www\.)?huggingface\.co/(?:(datasets)/)?([\w.-]+/[\w.-]+)(?:/(?:tree|blob)/([^/]+)(?:/(.*))?)?")


@dataclass(frozen=True)
class Address:
    """`place` is a bucket, a server with its scheme, or a repository of the hub; `key` is the path in it.

    revision, kind   of a repository: a branch, tag or commit; models or datasets
    """

    scheme: str
    place: str
    key: str
    revision: str | None = None
    kind: str = "models"

    def __str__(self) -> str:
        if self.scheme in ("http", "https"):
            return f"{self.place}/{self.key}"
        prefix = "" if self.kind == "models" else f"{self.kind}/"
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.scheme}://{prefix}{self.place}{at}{'/' if self.key else ''}{self.key}"

    @property
    def name(self) -> str:
        """The last part of it, which a folder that stands for it has as its name."""
        return (self.key or self.place).rpartition("/")[2]

    @property
    def folder(self) -> Address:
        """Where a file lies."""
        return replace(self, key=self.key.rpartition("/")[0])

    def below(self, name: str) -> str:
        """The key of a file in this folder."""
        return f"{self.key}/{name}" if self.key else name


def is_address(path: object) -> bool:
    """Whether this is a URL of a scheme that is read here, not a path on this machine."""
    return isinstance(path, (str, os.PathLike)) and _SHAPE.fullmatch(str(os.fspath(path))) is not None


def spelled(path: str | os.PathLike[str]) -> str:
    """A path as people write it: of an address, also with both slashes that a Path makes one of."""
    return str(parse(path)) if is_address(path) else os.fspath(path)


def parse(path: str | os.PathLike[str]) -> Address:
    """The parts of an address.  Raises UsageError for what is none, or cannot be read."""
    text = os.fspath(path)
    match = _SHAPE.fullmatch(text)
    if not match:
        raise UsageError(f"{show(text)} is no address", hint=f"schemes: {', '.join(f'{s}://' for s in SCHEMES)}")
    scheme, rest = match[1].lower(), match[2]
    if any(ord(c) < 32 or c in "\\\x7f" for c in rest) or " " in rest.partition("/")[0]:
        raise UsageError(f"{show(text)} has control characters, or a blank in its name",
                         hint="blanks may be in the key: quote it, 's3://BUCKET/A KEY'")  # fmt: skip
    if scheme == "hf":
        return _repository(text, rest.rstrip("/"))
    parts = urlsplit(f"{scheme}://{rest}")
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise UsageError(f"{show(text)} has a query, a fragment or a password in it, which are not read here",
                         hint="give the plain address; keys are taken from the environment")  # fmt: skip
    key = parts.path.strip("/")
    if any(part in ("", ".", "..") for part in key.split("/")) and key:
        raise UsageError(f"{show(text)} has an empty part, . or .. in it")
    if scheme in BUCKETS:
        return _bucket(scheme, parts.netloc, key)
    if scheme == "http" and not (LOCAL.fullmatch(parts.hostname or "") or os.environ.get("SURGERY_ALLOW_HTTP")):
        raise UsageError(f"{show(text)} is read in the clear, where anyone on the way may change it",
                         hint="write https://, or set SURGERY_ALLOW_HTTP=1 in a network that you trust")  # fmt: skip
    if page := _PAGE.fullmatch(f"{parts.netloc}/{key}"):
        kind, name, revision, path = page.groups(default="")
        found = Address("hf", name, path, revision or None, kind or "models")
        raise UsageError(f"{show(text)} is a page of the hub", hint=f"did you mean {found}?")
    return Address(scheme, f"{scheme}://{parts.netloc}", key)


def _bucket(scheme: str, bucket: str, key: str) -> Address:
    """A bucket; one that has a public address and no keys in the environment is read there."""
    if (
        scheme == "r2"
        and bucket in PUBLIC
        and not (os.environ.get("R2_ENDPOINT_URL") or os.environ.get("R2_ACCOUNT_ID"))
    ):
        return Address("https", PUBLIC[bucket], key)
    return Address(scheme, bucket, key)


def _repository(text: str, rest: str) -> Address:
    match = _REPO.fullmatch(rest)
    if not match:
        raise UsageError(f"{show(text)} names no repository", hint="write hf://ORG/NAME, hf://ORG/NAME@REVISION or "
                         "hf://datasets/ORG/NAME")  # fmt: skip
    key = (match["path"] or "").strip("/")
    if any(part in (".", "..") for part in [*match["name"].split("/"), *key.split("/")]):
        raise UsageError(f"{show(text)} has . or .. in it")
    return Address("hf", match["name"], key, match["revision"], match["kind"] or "models")
