"""Repositories of the Hugging Face hub that are in the local cache, by name.  Nothing is downloaded.

    cached("HuggingFaceTB/SmolLM2-135M")        # the folder of its `main`; `hf download NAME` puts it there

The layout is huggingface_hub's: `models--ORG--NAME/{refs,snapshots}`.
"""

from __future__ import annotations

import os
from pathlib import Path

from surgery.errors import FileError


def is_name(text: str) -> bool:
    """Is this ORG/NAME, and nothing that lies on the disk?"""
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not os.path.exists(text)


def name_and_revision(text: str) -> tuple[str, str | None]:
    """ORG/NAME@REVISION, taken apart."""
    name, _, revision = text.partition("@")
    return name, revision or None


def cached(name: str, revision: str | None = None) -> Path:
    """The folder of a repository that is in the cache.  Raises FileError if it is not."""
    folder = cache() / ("models--" + name.replace("/", "--"))
    commit = revision or "main"
    ref = folder / "refs" / commit
    if ref.is_file():
        commit = ref.read_text(errors="replace").strip()
    snapshot = folder / "snapshots" / commit
    if "/" in commit or not snapshot.is_dir():
        hint = f"download it first: hf download {name}" + (f" --revision {revision}" if revision else "")
        raise FileError("is neither a folder nor in the local cache of the hub", file=name, hint=hint)
    return snapshot


def cache() -> Path:
    """Where huggingface_hub keeps what it downloaded."""
    if found := os.environ.get("HF_HUB_CACHE"):
        return Path(found)
    return Path(os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface"))) / "hub"
