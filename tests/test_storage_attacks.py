"""Servers that lie: whatever they answer, the right bytes or a clear error, in bounded memory and time."""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from surgery.errors import FileError, SurgeryError
from surgery.storage import mirror, store
from surgery.storage.address import parse
from surgery.storage.copies import here
from surgery.storage.listing import listing
from surgery.storage.pull import pull
from surgery.storage.store import open_store
from surgery.tensors.files import File
from tests.buckets import Proxy, every, keys
from tests.servers import Quiet, served, web

ONE = ("<Contents><Key>{key}</Key><LastModified>2026-11-01T00:00:00Z</LastModified><ETag>&quot;ab&quot;</ETag>"
       "<Size>{size}</Size></Contents>")  # fmt: skip
ENDLESS = 500  # answers after which a test ends, whatever happens


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(store, "SLOW", timedelta(seconds=5))


class Lists:
    """A bucket whose lists are made by `page(number)`: what is in one, and whether there is more."""

    def __init__(self, page: Callable[[int], tuple[str, bool]]) -> None:
        self.asked, owner = 0, self

        class Handler(Quiet):
            def do_GET(self) -> None:
                owner.asked += 1
                if "list-type" not in self.path or owner.asked > ENDLESS:
                    return self.answer(404)
                inside, more = page(owner.asked)
                token = f"<NextContinuationToken>t{owner.asked}</NextContinuationToken>" if more else ""
                head = f"<Name>b</Name><Prefix></Prefix><IsTruncated>{str(more).lower()}</IsTruncated>{token}"
                text = f'<?xml version="1.0"?><ListBucketResult>{head}{inside}</ListBucketResult>'
                return self.answer(200, text.encode(), {"content-type": "application/xml"})

            def do_HEAD(self) -> None:
                self.answer(404)

        self.server = served(Handler)

    def __enter__(self) -> Lists:
        self.url = self.server.__enter__()
        return self

    def __exit__(self, *wrong: object) -> None:
        self.server.__exit__(None, None, None)


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[int], tuple[str, bool]]], Lists]]:
    opened: list[Lists] = []

    def make(page: Callable[[int], tuple[str, bool]]) -> Lists:
        opened.append(Lists(page).__enter__())
        monkeypatch.setenv("AWS_ENDPOINT_URL", opened[-1].url)
        return opened[-1]

    yield make
    for one in opened:
        one.__exit__()


def test_a_list_of_nothing_that_never_ends_is_an_error(lists: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lists(lambda number: ("", True))
    monkeypatch.setattr(store, "TIMEOUT", timedelta(seconds=0.5))
    began = time.monotonic()
    with pytest.raises(FileError, match=r"s3://b/x: the list of what is there does not end"):
        listing(parse("s3://b/x"))
    assert time.monotonic() - began < 4


def test_a_list_of_ever_more_is_an_error(lists: Any) -> None:
    server = lists(lambda number: ("".join(ONE.format(key=f"x/{number}-{i}", size=1) for i in range(100)), True))
    with pytest.raises(FileError, match="holds more than 1500 objects"):
        open_store(parse("s3://b/x")).list("x", 1500)
    assert server.asked < 40


@pytest.mark.parametrize(
    "key",
    [
        "x/../../evil.json",
        "x/./evil.json",
        "x/a//evil.json",
        "x/..",
        "x/a\\evil.json",
        "x/evil\x1b.json",
        "x//etc/evil",
    ],
)
def test_keys_that_lead_out_write_nothing(lists: Any, tmp_path: Path, key: str) -> None:
    listed = key.replace("\x1b", "&#x1b;")
    lists(lambda number: (ONE.format(key="x/config.json", size=2) + ONE.format(key=listed, size=2), False))
    for take in (mirror.folder_of, here, lambda url: pull(url, tmp_path / "got")):
        with pytest.raises(SurgeryError):
            take("s3://b/x")
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name] and not (tmp_path / "got").exists()


@pytest.mark.parametrize("size", ["-1", "18446744073709551615", "9e99", ""])
def test_sizes_that_are_none_are_an_error(lists: Any, size: str) -> None:
    lists(lambda number: (ONE.format(key="x/model.safetensors", size=size), False))
    with pytest.raises(SurgeryError, match="s3://b/x"):
        listing(parse("s3://b/x"))


def test_what_claims_to_be_packed_is_not_unpacked(tmp_path: Path) -> None:
    """A body of a kilobyte that would unpack to a gigabyte: the bytes are taken as they are, or not at all."""
    bomb = gzip.compress(bytes(1 << 26), 9)

    class Packed(Quiet):
        def do_GET(self) -> None:
            self.send_response(200)
            wanted = self.headers.get("Range")
            data = bomb
            if wanted:
                start, _, stop = wanted.removeprefix("bytes=").partition("-")
                data = bomb[int(start) : int(stop) + 1]
            for name, value in {"content-length": str(len(data)), "content-encoding": "gzip", "etag": '"a"',
                                "last-modified": "Sun, 01 Nov 2026 00:00:00 GMT"}.items():  # fmt: skip
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET

        def send_response(self, code: int, message: str | None = None) -> None:
            ranged = self.headers.get("Range")
            super().send_response(206 if ranged else code, message)
            if ranged:
                start, _, stop = ranged.removeprefix("bytes=").partition("-")
                self.send_header("content-range", f"bytes {start}-{min(int(stop), len(bomb) - 1)}/{len(bomb)}")

    with served(Packed) as url:
        file = File(mirror.folder_of(f"{url}/x.bin"))
        assert file.size == len(bomb)
        assert file.read(0, len(bomb)) == bomb


@pytest.mark.parametrize(
    "place", ["file:///etc/hostname", "http://169.254.169.254/latest/meta-data/", "ftp://127.0.0.1/x", "data:,x", "//"]
)
def test_redirects_lead_nowhere_else(tmp_path: Path, place: str) -> None:
    (tmp_path / "x.bin").write_bytes(bytes(range(256)) * 4096)
    with web(tmp_path) as upstream, Proxy(upstream) as proxy:
        path = mirror.folder_of(f"{proxy.url}/x.bin")
        proxy.fault = every(1, f"redirect {place}")
        with pytest.raises(FileError) as caught:
            File(path).read(0, 1000)
        assert f"{proxy.url}/x.bin" in str(caught.value)
        with pytest.raises(FileError):
            pull(f"{proxy.url}/x.bin", tmp_path / "got")
    assert not (tmp_path / "got").exists()


def test_only_servers_that_encrypt_are_led_to_from_one_that_does() -> None:
    """A client of https:// follows no redirect to http://, where metadata of clouds lie."""
    assert store._client("https://example.org")["allow_http"] is False
    assert store._client(None)["allow_http"] is False
    assert store._client("http://127.0.0.1:1")["allow_http"] is True
