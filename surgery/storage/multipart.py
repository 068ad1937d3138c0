"""Uploads in parts to s3:// and r2://: those of a killed push go on, and what is left over is aborted.

    send(store, "model/x.safetensors", item, told, stop)    # the object is there; parts that were, were not sent again
    abort(store, {"model/x.safetensors"})                   # how many never ended: no objects, and they cost as much

obstore has no calls that list them, so boto3 does all of this.  Azure forgets such parts after a week; for Google's
buckets, and for all that nobody pushes to again, set the rule of a bucket's lifecycle that aborts them.
"""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

from surgery.errors import FileError, printable
from surgery.storage.contents import Item, part_size
from surgery.storage.store import TIMEOUT, Environment, Store, environment, s3_endpoint, s3_session
from surgery.storage.together import Stopped, Told, from_threads, together

LISTED = ("s3", "r2")  # schemes where they can be found
TOGETHER = 4  # parts of one file at a time


def send(store: Store, key: str, item: Item, told: Told, stop: threading.Event) -> None:
    """Upload a file in parts; what an earlier upload has sent, and is equal, is left.  Raises FileError."""
    step, advance = part_size(item.size), from_threads(told)
    with _said(store, f"{key} cannot be uploaded in parts", "look at the network and at the rights of the keys"):
        client = _client(store.address.scheme, environment())
        where = {"Bucket": store.address.place, "Key": key}
        upload, there = _begun(client, store, key) or (client.create_multipart_upload(**where)["UploadId"], {})
        where["UploadId"] = upload

        def one(number: int, failed: threading.Event) -> dict[str, Any]:
            if stop.is_set():
                raise Stopped("stopped")
            data = item.read((number - 1) * step, min(number * step, item.size))
            digest = hashlib.md5(data, usedforsecurity=False)
            if there.get(number) != (len(data), f'"{digest.hexdigest()}"'):
                checked = base64.b64encode(digest.digest()).decode()
                sent = client.upload_part(**where, PartNumber=number, Body=data, ContentMD5=checked)
                there[number] = len(data), sent["ETag"]
            advance(len(data))
            return {"PartNumber": number, "ETag": there[number][1]}

        parts = together(one, range(1, -(-item.size // step) + 1), TOGETHER)
        client.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})


def abort(store: Store, keys: Collection[str]) -> int:
    """Abort those of some keys; how many they were.  Raises FileError if the store does not allow to list them."""
    if store.address.scheme not in LISTED:
        return 0
    count = 0
    with _said(store, "unfinished uploads cannot be listed or aborted",
               "a rule of the bucket's lifecycle can abort them"):  # fmt: skip
        client = _client(store.address.scheme, environment())
        for found in _unfinished(client, store, store.address.key):
            if found["Key"] in keys:
                with suppress(client.exceptions.NoSuchUpload):  # aborted, and the answer was lost
                    client.abort_multipart_upload(
                        Bucket=store.address.place, Key=found["Key"], UploadId=found["UploadId"]
                    )
                count += 1
    return count


def _begun(client: Any, store: Store, key: str) -> tuple[str, dict[int, tuple[int, str]]] | None:
    """The upload that was begun last, and size and ETag of each of its parts: a digest, unless the bucket is encrypted
    with keys of its own.  None if there is none, or the keys do not allow to look.
    """
    with suppress(client.exceptions.ClientError):
        ids = [upload["UploadId"] for upload in _unfinished(client, store, key) if upload["Key"] == key]
        for upload in ids[-1:]:
            pages = client.get_paginator("list_parts").paginate(Bucket=store.address.place, Key=key, UploadId=upload)
            parts = [part for page in pages for part in page.get("Parts", [])]
            return upload, {part["PartNumber"]: (part["Size"], part["ETag"]) for part in parts}
    return None


def _unfinished(client: Any, store: Store, prefix: str) -> list[Mapping[str, Any]]:
    """Uploads that were begun and have not ended, in the order in which they were begun."""
    pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=store.address.place, Prefix=prefix)
    found = [upload for page in pages for upload in page.get("Uploads", [])]
    return sorted(found, key=lambda upload: str(upload.get("Initiated")))


@lru_cache(maxsize=2)
def _client(scheme: str, said: Environment) -> Any:
    """boto3's client, made once for what the environment says."""
    import boto3

    session, endpoint = s3_session(scheme), s3_endpoint(scheme)
    settings = {
        "retries": {"max_attempts": 6, "mode": "standard"},
        "connect_timeout": 20,
        "read_timeout": TIMEOUT.total_seconds(),
        "request_checksum_calculation": "when_required",  # other stores than Amazon's do not know these
        "response_checksum_validation": "when_required",
        "s3": {"addressing_style": "path"} if endpoint else None,
    }
    return session.client("s3", endpoint_url=endpoint, region_name=session.region_name or "us-east-1",
                          config=boto3.session.botocore.config.Config(**settings))  # fmt: skip


@contextmanager
def _said(store: Store, what: str, hint: str) -> Iterator[None]:
    """What boto3 raises, as a FileError."""
    import boto3

    wrong = boto3.session.botocore.exceptions
    try:
        yield
    except (wrong.BotoCoreError, wrong.ClientError) as error:
        raise FileError(f"{what}: {printable(str(error), 200)}", file=str(store.address), hint=hint) from None
