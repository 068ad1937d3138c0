"""What stores answer when they refuse, in words, and whether to ask again.

refusal("... <Code>ExpiredToken</Code> ...", "...").what        # "the keys have expired"
refusal("... status code: 429 Too Many Requests", "...").wait   # True
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from surgery.errors import FileError

KEYS = {"s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE", "gs": "GOOGLE_APPLICATION_CREDENTIALS",
        "r2": "R2_ACCESS_KEY_ID, R2_SECRET_ACCESS_KEY and R2_ACCOUNT_ID (or R2_ENDPOINT_URL)", "hf": "HF_TOKEN",
        "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"}  # fmt: skip
WAITS = (1, 2, 4, 8, 15, 30, 60)  # seconds before a store that asks for patience is asked again


@dataclass(frozen=True)
class Refusal:
    """What is told of an answer; `wait`: another one may come later, otherwise it stays the same."""

    what: str
    hint: str | None = None  # None: where keys are taken from
    wait: bool = False


class Refused(FileError):
    """An answer that stays the same however often one asks."""


class Busy(FileError):
    """A store that wants to be asked later."""


_NO_BUCKET = Refusal("there is no such bucket", "look at its name and at the endpoint")
_DENIED = Refusal("may not be used")
_REGION = Refusal("the bucket lies in another region", "AWS_REGION says which")
_BUSY = Refusal("the store is asked too often", "try again later, or with fewer commands at a time", wait=True)
# by the codes that S3, Google and Azure have for it, else by the status
REFUSALS = {
    "NoSuchBucket": _NO_BUCKET, "ContainerNotFound": _NO_BUCKET,
    "InvalidBucketName": Refusal("no bucket is called so", "look at its name"),
    "ExpiredToken": Refusal("the keys have expired", "renew them: log in again, or get another AWS_SESSION_TOKEN"),
    "TokenRefreshRequired": Refusal("the keys have expired", "renew them: log in again"),
    "InvalidAccessKeyId": Refusal("the store does not know the key"),
    "SignatureDoesNotMatch": Refusal("the secret is not that of the key"),
    "RequestTimeTooSkewed": Refusal("the clock of this machine differs from the store's", "set the clock"),
    "PermanentRedirect": _REGION, "AuthorizationHeaderMalformed": _REGION, "incorrectly configured region": _REGION,
    "performing token request": Refusal("no keys were found"),
    "SlowDown": _BUSY, "TooManyRequests": _BUSY, "ServerBusy": _BUSY,
    "AccessDenied": _DENIED, "Forbidden": _DENIED, "Unauthorized": _DENIED, "429": _BUSY, "503": _BUSY, "401": _DENIED,
    "403": _DENIED,
}  # fmt: skip
_WORDS = re.compile(r"<Code>(\w+)</Code>|(incorrectly configured region|performing token request)|status code: (\d{3})")


def refusal(text: str, short: str) -> Refusal | None:
    """What a client's error means; None if it is none of these.

    A status alone does not tell who refuses, or why: what is `short` of the text is told, too.
    """
    found = [word for match in _WORDS.finditer(text) for word in match.groups() if word in REFUSALS]
    if not found:
        return None
    word = min(found, key=str.isdigit)
    known = REFUSALS[word]
    return replace(known, what=f"{known.what}: {short}") if word.isdigit() and not known.wait else known


def refused(found: Refusal, scheme: str, url: str, signed: bool) -> FileError:
    """The error; `signed`: keys were found."""
    keys = f"keys are taken from {KEYS[scheme]}" if scheme in KEYS else None
    hint = found.hint or (keys if signed or not keys else f"no keys were found; {keys}")
    return (Busy if found.wait else Refused)(found.what, file=url, hint=hint)
