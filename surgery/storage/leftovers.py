"""Uploads in parts that were begun and never ended: they are no objects, and cost as much.

    abort(store, {"model/model.safetensors"})       # how many there were

obstore has no call that lists them, so boto3 does, for s3:// and r2://.  Azure forgets such parts after a week; for
Google's buckets, and for all that nobody pushes to again, set the rule of a bucket's lifecycle that aborts them.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

from surgery.errors import FileError, printable
from surgery.storage.store import Store, s3_endpoint, s3_session

LISTED = ("s3", "r2")  # schemes where they can be found


def abort(store: Store, keys: Collection[str]) -> int:
    """Abort those of some keys; how many they were.  Raises FileError if the store does not allow to list them."""
    address = store.address
    if address.scheme not in LISTED:
        return 0
    import boto3

    wrong = boto3.session.botocore.exceptions
    count = 0
    try:
        session = s3_session(address.scheme)
        client = session.client("s3", endpoint_url=s3_endpoint(address.scheme),
                                region_name=session.region_name or "us-east-1")  # fmt: skip
        pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=address.place, Prefix=address.key)
        for page in pages:
            for found in page.get("Uploads", []):
                if found["Key"] in keys:
                    with suppress(client.exceptions.NoSuchUpload):  # aborted, and the answer was lost
                        client.abort_multipart_upload(
                            Bucket=address.place, Key=found["Key"], UploadId=found["UploadId"]
                        )
                    count += 1
    except (wrong.BotoCoreError, wrong.ClientError) as error:
        what = f"unfinished uploads cannot be listed or aborted: {printable(str(error), 200)}"
        raise FileError(what, file=str(address), hint="a rule of the bucket's lifecycle can abort them") from None
    return count
