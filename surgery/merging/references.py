"""Models by the names that a merge gives them: folders of any format, hub ids that are in the local cache, adapters.

    opened = open_all(recipe.models())          # Reference -> Checkpoint; nothing of the weights is read

Nothing is downloaded: `hf download NAME` puts a model into the cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from surgery.containers import hub
from surgery.errors import ConfigError
from surgery.formats.base import Checkpoint, Options
from surgery.formats.registry import open_checkpoint, own_options
from surgery.merging.adapters import with_adapter
from surgery.merging.lora_config import FILE
from surgery.merging.reader import Place, Reference
from surgery.storage.address import is_address
from surgery.storage.mirror import folder_of
from surgery.tensors.files import watched

Opened = Mapping[Reference, Checkpoint]


def locate(place: Place) -> Path:
    """The folder of a model or adapter.  Raises FileError if it is neither a folder nor in the hub's cache."""
    if is_address(place.path):
        return folder_of(str(place))
    folder = Path(os.path.expanduser(place.path))
    if not hub.is_name(place.path):
        if place.revision and folder.exists():
            raise ConfigError(f"{place} names a revision, but {folder} is a folder")
        return folder
    return hub.cached(place.path, place.revision)


def model_folder(reference: Reference) -> Path:
    """The folder of the model, without its adapter.  Raises ConfigError if an adapter stands where a model should."""
    folder = locate(reference.model)
    if (folder / FILE).is_file() and not (folder / "config.json").is_file():
        raise ConfigError(f"{reference.model} is an adapter, not a model", hint=f"write BASE+{reference.model}")
    return folder


def open_reference(reference: Reference, options: Options | None = None) -> Checkpoint:
    """A model as the merge names it, its adapter applied.  Raises SurgeryError."""
    folder = model_folder(reference)
    with watched() as stamps:
        checkpoint = open_checkpoint(folder, options=own_options(folder, options))
        if reference.lora is not None:
            checkpoint = with_adapter(checkpoint, locate(reference.lora))
    if reference.architecture is not None:
        note = f"override_architecture of {reference} has no effect: the tensors say what it is"
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, note))
    return replace(checkpoint, stamps=stamps)


def open_all(references: Iterable[Reference], options: Options | None = None) -> dict[Reference, Checkpoint]:
    """Every model of a merge."""
    return {reference: open_reference(reference, options) for reference in references}
