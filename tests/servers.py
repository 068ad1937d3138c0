"""A web server that answers ranges, and a hub of models, on this machine.

with web(folder) as url:
    ...                                     # f"{url}/config.json"
with Hub() as hub:
    hub.put("org/name", {"config.json": b"{}"})
    hub.endpoint, hub.files("org/name")     # what the last commit holds
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".bin", ".pth", ".pt")  # what the hub keeps elsewhere, by the names in its .gitattributes


@contextmanager
def served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, data: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def ranged(self, data: bytes) -> None:
        """The bytes that are asked for, or all."""
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        headers = {"etag": tag, "last-modified": "Sun, 01 Nov 2026 00:00:00 GMT", "accept-ranges": "bytes"}
        if (wanted := self.headers.get("If-Match")) and wanted != tag:
            return self.answer(412)
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
            start, stop = int(match[1]), min(int(match[2]) + 1, len(data))
            headers["content-range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            return self.answer(206, data[start:stop], headers)
        return self.answer(200, data, {**headers, "content-length": str(len(data))})


@contextmanager
def web(folder: Path) -> Iterator[str]:
    """The URL of a server of a folder's files, which lists nothing."""

    class Handler(Quiet):
        def do_GET(self) -> None:
            path = folder / unquote(self.path.lstrip("/"))
            self.ranged(path.read_bytes()) if path.is_file() else self.answer(404, b"<html>not here</html>")

        do_HEAD = do_GET

    with served(Handler) as url:
        yield url


class Hub:
    """Repositories with their commits, large files at another host, as huggingface.co has it.

    change   what becomes of each JSON answer, for hubs that lie
    seen     [(method, path, authorization), ...] of both hosts
    """

    def __init__(self, token: str = "hf_secret") -> None:
        self.token = token
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.blobs: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.summaries: list[dict[str, Any]] = []
        self.change: Callable[[str, Any], Any] = lambda path, data: data
        self.before_commit: Callable[[], None] = lambda: None
        self.lose_commits = False
        self.seen: list[tuple[str, str, str | None]] = []
        hub = self

        class Here(_Hub):
            owner = hub

        class There(_Elsewhere):
            owner = hub

        self._servers = served(Here), served(There)
        self.endpoint = self.elsewhere = ""

    def __enter__(self) -> Hub:
        self.endpoint, self.elsewhere = (server.__enter__() for server in self._servers)
        return self

    def __exit__(self, *wrong: object) -> None:
        for server in self._servers:
            server.__exit__(None, None, None)

    def put(self, name: str, files: Mapping[str, bytes]) -> str:
        """A commit with these files besides those that there are."""
        before = self.commits.setdefault(name, [("0" * 40, {})])
        every = {**before[-1][1], **files}
        sha = hashlib.sha1(repr((len(before), sorted(every.items()))).encode()).hexdigest()
        before.append((sha, every))
        return sha

    def files(self, name: str) -> dict[str, bytes]:
        return self.commits[name][-1][1]


class _Hub(Quiet):
    owner: Hub

    def begin(self) -> tuple[str, bytes]:
        self.owner.seen.append((self.command, self.path, self.headers.get("Authorization")))
        return unquote(urlsplit(self.path).path), self.body()

    def say(self, data: Any, status: int = 200) -> None:
        text = json.dumps(self.owner.change(self.path, data)).encode()
        self.answer(status, text, {"content-type": "application/json"})

    def do_GET(self) -> None:
        path, _ = self.begin()
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.info(match[1], match[2])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            files = dict(self.owner.commits.get(match[1], [])).get(match[2], {})
            if (data := files.get(match[3])) is None:
                return self.answer(404)
            if match[3].endswith(LFS):
                place = f"{self.owner.elsewhere}/{hashlib.sha256(data).hexdigest()}"
                self.owner.blobs.setdefault(hashlib.sha256(data).hexdigest(), data)
                return self.answer(302, b"", {"location": place})
            return self.ranged(data)
        return self.answer(404)

    do_HEAD = do_GET

    def info(self, name: str, revision: str | None) -> None:
        commits = self.owner.commits.get(name)
        found = [c for c in commits or () if revision in (None, "main", c[0])]
        if not found:
            return self.answer(404, b"", {"x-error-code": "RevisionNotFound" if commits else "RepoNotFound"})
        sha, files = found[-1]
        self.say({"id": name, "sha": sha, "siblings": [self.sibling(n, d) for n, d in files.items()]})

    def sibling(self, name: str, data: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        lfs = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
        return {"rfilename": name, "size": len(data), "blobId": blob} | ({"lfs": lfs} if name.endswith(LFS) else {})

    def do_POST(self) -> None:
        path, body = self.begin()
        if self.headers.get("Authorization") != f"Bearer {self.owner.token}":
            return self.answer(401, b"", {"x-error-message": "Invalid credentials"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            there = name in self.owner.commits
            self.owner.created.append(asked)
            self.owner.commits.setdefault(name, [("0" * 40, {})])
            return self.say({"url": f"{self.owner.endpoint}/{name}"}, 409 if there else 200)
        if path == "/api/validate-yaml":
            return self.say({"warnings": [], "errors": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = self.owner.files(match[1])
            return self.say({"files": [self.mode(f["path"], files) for f in json.loads(body)["files"]]})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.say({"objects": [self.place(o) for o in json.loads(body)["objects"]]})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self.commit(match[1], body)
        return self.answer(404)

    def mode(self, name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
        large = name.endswith(LFS)
        data = files.get(name)
        oid = (
            None if data is None else hashlib.sha256(data).hexdigest() if large else self.sibling(name, data)["blobId"]
        )
        return {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def place(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.owner.blobs:
            return dict(wanted)
        return {**wanted, "actions": {"upload": {"href": f"{self.owner.elsewhere}/{wanted['oid']}"}}}

    def commit(self, name: str, body: bytes) -> None:
        self.owner.before_commit()
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        head = self.owner.commits[name][-1][0]
        if header.get("parentCommit") not in (None, head):
            return self.answer(
                412, b"", {"x-error-message": "A commit has happened since. Please refresh and try again."}
            )
        files = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del self.owner.commits[name][-1][1][value["path"]]
                continue
            files[value["path"]] = (
                self.owner.blobs[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
            )
        self.owner.summaries.append(header)
        sha = self.owner.put(name, files)
        if self.owner.lose_commits:
            self.connection.close()
            self.close_connection = True
            return None
        self.say({"commitUrl": f"{self.owner.endpoint}/{name}/commit/{sha}", "commitOid": sha})


class _Elsewhere(Quiet):
    """Where the hub's large files are."""

    owner: Hub

    def do_GET(self) -> None:
        self.owner.seen.append((self.command, self.path, self.headers.get("Authorization")))
        data = self.owner.blobs.get(self.path.lstrip("/"))
        self.answer(404) if data is None else self.ranged(data)

    def do_PUT(self) -> None:
        data = self.body()
        self.owner.seen.append((self.command, self.path, self.headers.get("Authorization")))
        if hashlib.sha256(data).hexdigest() != self.path.lstrip("/"):
            return self.answer(400)
        self.owner.blobs[self.path.lstrip("/")] = data
        return self.answer(200)
