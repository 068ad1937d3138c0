"""A bucket on this machine (moto's S3 server), and a proxy before it that drops, cuts, delays and lies.

with Proxy(upstream) as proxy:
    proxy.fault = every(3, "half")       # each third answer is cut in the middle of its body
    ...
    proxy.seen                            # [("GET", "/bucket/key", "bytes=0-99"), ...]
"""

from __future__ import annotations

import http.client
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from surgery.storage import copies, mirror

BUCKET = "bucket"
FILES = {"model-00001.safetensors": 6 << 20, "model-00002.safetensors": 3000, "config.json": 40,
         "model.safetensors.index.json": 90, "surgery.json": 7, "a/tokenizer.json": 0}  # fmt: skip
HOP = {"transfer-encoding", "connection", "keep-alive", "content-length", "server", "date"}
REFUSALS = {"503": (503, "SlowDown"), "429": (429, "TooManyRequests"), "401": (401, "Unauthorized"),
            "403": (403, "AccessDenied"), "expired": (400, "ExpiredToken"), "keys": (403, "InvalidAccessKeyId"),
            "signature": (403, "SignatureDoesNotMatch"), "clock": (403, "RequestTimeTooSkewed")}  # fmt: skip
ENDLESS = 40_000_000  # bytes after which an endless body ends, so that a test does


def keys(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """An environment with keys and a folder for copies, in which nothing is known of any address."""
    for name, value in {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1",
                        "SURGERY_CACHE": str(cache)}.items():  # fmt: skip
        patch.setenv(name, value)
    patch.delenv("AWS_PROFILE", raising=False)
    mirror._known.clear()
    copies._known.clear()


@contextmanager
def moto() -> Iterator[str]:
    """The URL of an empty S3 server."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@dataclass(frozen=True)
class Bucket:
    """What lies in a bucket, and the proxy before it."""

    client: Any
    proxy: Proxy

    def upload(self, folder: Path, prefix: str) -> str:
        """Put the files of a folder below a prefix; their address."""
        return self.put(prefix, held(folder))

    def put(self, prefix: str, files: Mapping[str, bytes]) -> str:
        for name, data in files.items():
            self.client.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=data)
        return f"s3://{BUCKET}/{prefix}"

    def sizes(self, prefix: str) -> dict[str, int]:
        """The objects below a prefix, by the rest of their keys."""
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/").get("Contents", [])
        return {item["Key"][len(prefix) + 1 :]: item["Size"] for item in found}

    def objects(self, prefix: str) -> dict[str, bytes]:
        keys = {name: f"{prefix}/{name}" for name in self.sizes(prefix)}
        return {name: self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for name, key in keys.items()}

    def unfinished(self) -> list[str]:
        return [u["Key"] for u in self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])]

    def parts(self, key: str) -> list[int]:
        """The numbers of the parts that an upload of an object has so far."""
        found = [u for u in self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []) if u["Key"] == key]
        held = [self.client.list_parts(Bucket=BUCKET, Key=key, UploadId=u["UploadId"]) for u in found]
        return [part["PartNumber"] for one in held for part in one.get("Parts", [])]

    def puts(self) -> list[str]:
        """The objects that were sent, in order, each once."""
        sent = [p.partition("?")[0] for m, p, _ in self.proxy.seen if m in ("PUT", "POST") and "?delete" not in p]
        return [path.removeprefix(f"/{BUCKET}/").split("/", 1)[1] for path in dict.fromkeys(sent)]


@contextmanager
def bucket_before(url: str, patch: pytest.MonkeyPatch, cache: Path) -> Iterator[Bucket]:
    """An empty bucket behind a proxy without faults, the environment that leads there, and no copies of anything."""
    import boto3

    keys(patch, cache)
    client = boto3.client("s3", endpoint_url=url)
    client.create_bucket(Bucket=BUCKET)
    with Proxy(url) as proxy:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield Bucket(client, proxy)
    for item in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=item["Key"])


def model(folder: Path) -> Path:
    """A folder of FILES, of which no two have the same bytes."""
    for i, (name, size) in enumerate(FILES.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((bytes([i]) + os.urandom(1023)) * (size // 1024) + bytes(size % 1024))
    return folder


def held(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def every(n: int, fault: str, method: str = "") -> Callable[[int, str, str], str | None]:
    """A fault at each n-th request (of a method)."""
    count = 0

    def choose(number: int, asked: str, path: str) -> str | None:
        nonlocal count
        if method and asked != method:
            return None
        count += 1
        return fault if count % n == 0 else None

    return choose


def none(number: int, asked: str, path: str) -> str | None:
    return None


class Proxy:
    """`fault(number of the request, method, path)` says what becomes of an answer: None, a word, or what to call."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream.removeprefix("http://")
        self.fault: Callable[[int, str, str], str | None] = none
        self.seen: list[tuple[str, str, str | None]] = []
        self.sent = 0
        self.lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *wrong: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def gets(self, part: str = "") -> list[str | None]:
        """The ranges that were asked for, of paths with this in them."""
        return [r for method, path, r in self.seen if method == "GET" and part in path and "list-type" not in path]

    def listed(self) -> list[str]:
        """The prefixes that were listed, and whatever else was asked but for bytes."""
        asked = [path for method, path, _ in self.seen if method == "HEAD" or "list-type" in path]
        return [parse_qs(urlsplit(path).query).get("prefix", [path])[0] for path in asked]


def _plain(tag: bytes) -> bytes:
    return tag.replace(b"&quot;", b"").replace(b'"', b"")


class _Handler(BaseHTTPRequestHandler):
    owner: Any
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def forward(self) -> None:
        owner = self.owner
        body = self.body()
        with owner.lock:
            owner.seen.append((self.command, self.path, self.headers.get("Range")))
            fault = owner.fault(len(owner.seen), self.command, self.path)
        if fault == "drop":
            self.connection.close()
            self.close_connection = True
            return
        if isinstance(fault, str) and fault in REFUSALS:
            status, code = REFUSALS[fault]
            headers = [("content-type", "application/xml"), ("retry-after", "1")]
            return self.answer(status, headers, b"<Error><Code>%s</Code></Error>" % code.encode())
        if isinstance(fault, str) and fault.startswith("redirect"):
            place = fault.partition(" ")[2] or "file:///etc/hostname"
            return self.answer(302, [("location", place)], b"")
        if fault == "whole":  # as a server that knows no ranges
            del self.headers["Range"]
        if callable(fault):  # something happens in between
            fault()
        if fault == "google" and self.headers.get("x-goog-if-generation-match") == "0":
            self.headers["If-None-Match"] = "*"  # what Google's preconditions mean in S3's words
        if fault == "opaque" and (tag := self.headers.get("If-Match")):
            self.headers.replace_header("If-Match", tag[::-1])
        status, headers, data = self.ask(body)
        if (
            fault == "opaque" and "partNumber" not in self.path
        ):  # ETags that are no digests, as of encrypted buckets and other stores
            headers = [(k, v[::-1] if k.lower() == "etag" else v) for k, v in headers]
            data = re.sub(rb"(?<=<ETag>)[^<]+", lambda m: b"&quot;" + _plain(m[0])[::-1] + b"&quot;", data)
        if fault == "lost":
            self.connection.close()
            self.close_connection = True
            return
        if fault == "other bytes":
            data = data[:-8] + bytes(8 - len(data[-8:])) + data[-8:][::-1]
        self.answer(status, headers, data, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            out = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                out += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return out
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.owner.upstream, timeout=30)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP}
        connection.request(self.command, self.path, body or None, {**headers, "Content-Length": str(len(body))})
        reply = connection.getresponse()
        data = reply.read()
        kept = [(k, v) for k, v in reply.getheaders() if k.lower() not in HOP]
        length = reply.getheader("content-length")
        if self.command == "HEAD" and length:
            kept.append(("content-length", length))
        connection.close()
        return reply.status, kept, data

    def answer(self, status: int, headers: list[tuple[str, str]], data: bytes, fault: str | None = None) -> None:
        """The status, the headers and the body, or what a fault makes of it."""
        self.send_response(status)
        if fault == "other tag":
            headers = [(k, '"0123"' if k.lower() == "etag" else v) for k, v in headers]
        if fault == "huge":
            headers = [(k, v.rpartition("/")[0] + "/999999999999" if k.lower() == "content-range" else v)
                       for k, v in headers]  # fmt: skip
        if fault == "shifted":
            headers = [(k, "bytes 1-" + v.split("-", 1)[1] if k.lower() == "content-range" else v) for k, v in headers]
        for name, value in headers:
            self.send_header(name, value)
        if fault == "endless":
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            return self.endlessly()
        if self.command != "HEAD":
            self.send_header("content-length", str(len(data) + (7 if fault == "longer" else 0)))
        self.end_headers()
        if self.command == "HEAD":
            return
        body = data[: len(data) // 2] if fault == "half" else data + b"evil..." if fault == "longer" else data
        self.owner.sent += len(body)
        self.wfile.write(body)
        if fault == "half":
            self.close_connection = True

    def endlessly(self) -> None:
        piece = b"x" * 65536
        try:
            for _ in range(ENDLESS // len(piece)):
                self.wfile.write(b"10000\r\n" + piece + b"\r\n")
                self.owner.sent += len(piece)
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            pass
        self.close_connection = True
