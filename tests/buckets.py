"""A bucket on this machine (moto's S3 server), and a proxy before it that drops, cuts, delays and lies.

with Proxy(upstream) as proxy:
    proxy.fault = every(3, "half")       # each third answer is cut in the middle of its body
    ...
    proxy.seen                            # [("GET", "/bucket/key", "bytes=0-99"), ...]
"""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from surgery.storage import copies, mirror

HOP = {"transfer-encoding", "connection", "keep-alive", "content-length", "server", "date"}
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
        if fault == "503":
            return self.answer(503, [("content-type", "application/xml")], b"<Error><Code>SlowDown</Code></Error>")
        if fault == "403":
            return self.answer(403, [("content-type", "application/xml")], b"<Error><Code>AccessDenied</Code></Error>")
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
