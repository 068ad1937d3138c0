"""What --force may replace: what surgery wrote, and checkpoints; never a folder with other files.

    others(Path("out"))        # ["thesis.txt"]: files that are part of no checkpoint

An output lists its files in a record.  For other checkpoints there is a table of names, as programs that train, save
and load models write them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import reduce
from operator import getitem
from pathlib import Path

from surgery.containers.text import read_json
from surgery.errors import SurgeryError

PROVENANCE = "surgery.json"  # what surgery writes beside a checkpoint: where it comes from
TOKENS = "tokens.json"
# the records that surgery writes into its outputs, and under which keys one lists files
RECORDS = {PROVENANCE: ("output", "files"), TOKENS: ("files",), "plan.json": ("files",)}

# what file managers, indexers and network file systems leave behind
JUNK = (".DS_Store", "._*", ".nfs*", ".fuse_hidden*", "Thumbs.db", "desktop.ini", ".directory", ".localized",
        ".AppleDouble", ".Spotlight-V100", ".Trashes", ".fseventsd", "@eaDir")  # fmt: skip

WEIGHTS = ("*.safetensors", "*model*.bin", "*model*.pt", "*optim*.pt", "*rank*.pt", "common.pt", "*model*.pth",
           "consolidated.*.pth", "*.distcp", "*.ckpt", "*.gguf")  # fmt: skip
BESIDE = (
    # configs, indices and trackers
    "config.json", "generation_config.json", "*.index.json", "params.json", "config.yaml", "run_config.yaml",
    ".metadata", ".metadata.json", "metadata.json", "metadata.yaml", "latest", "latest_checkpointed_iteration.txt",
    "adapter_config.json", "quantize_config.json", "configuration.json", "checklist.chk",
    # tokenizers and processors
    "tokenizer.json", "tokenizer_config.json", "*_tokenizer.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "*.model", "*.tiktoken", "chat_template.jinja",
    "chat_template.json", "tokenizer_checklist.chk", "preprocessor_config.json", "processor_config.json",
    # the state of a run
    "trainer_state.json", "training_args.bin", "optimizer.bin", "scheduler.bin", "scheduler.pt", "train.pt",
    "rng_state*.pth", "random_states_*.pkl", "zero_to_fp32.py", "soup.json", "mergekit_config.yml", "bad_lines.jsonl",
    # of a hub
    "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*", ".gitattributes", ".gitignore", "modeling_*.py",
    "configuration_*.py", "tokenization_*.py",
)  # fmt: skip
INSIDE = ("configs/*.yml", "configs/*.yaml", ".cache/huggingface/*", "additional_chat_templates/*.jinja")
# folders of a checkpoint; of the first kind it has one, where a folder of runs, or a run, has several
STEPS = ("iter_*", "release", "global_step*", "step*")
FOLDERS = ("mp_rank_*", "configs", "model_and_optim", "model", "optim", "train", "original")


def is_junk(name: str) -> bool:
    """Whether a file or folder of this name was left by the system."""
    return _any(name, JUNK)


def others(folder: Path) -> list[str]:
    """Files below a folder that are part of no checkpoint; every file, if it holds none.  Raises OSError."""
    names, ours = _names(folder), _written(folder)
    stems = {_stem(name) for name in ours} if TOKENS in ours else set()
    tops = {name.split("/")[0] for name in names if "/" in name}
    several = sum(_any(top, STEPS) for top in tops) > 1
    strange = [n for n in names if n not in ours and _stem(n) not in stems and not _known(n, several)]
    weights = any(_any(os.path.basename(name), WEIGHTS) for name in names)
    return strange if ours or weights else names


def _stem(name: str) -> str:
    """What a file of tokens has in common with its index and its mask."""
    return name.split(".", 1)[0]


def _names(folder: Path) -> list[str]:
    """Files and links below a folder, junk left out."""
    names: list[str] = []
    for at, folders, files in os.walk(folder, onerror=_raise):
        links = [name for name in folders if os.path.islink(os.path.join(at, name))]
        names += [os.path.relpath(os.path.join(at, name), folder) for name in (*files, *links) if not is_junk(name)]
        folders[:] = [name for name in folders if not is_junk(name)]
    return sorted(names)


def _raise(error: OSError) -> None:
    raise error


def _written(folder: Path) -> set[str]:
    """The files that surgery's own records say it wrote here; none if there is no such record."""
    found: set[str] = set()
    for record, keys in RECORDS.items():
        with suppress(SurgeryError, KeyError, TypeError):
            found |= {record, *reduce(getitem, keys, read_json(folder / record, record))}
    return found


def _known(name: str, several: bool) -> bool:
    """Whether a file is part of a checkpoint by its name; `several`: the folder holds several steps of a run."""
    *folders, base = name.split("/")
    if any(_any(name, (pattern, f"*/{pattern}")) for pattern in INSIDE):
        return True
    inner = all(_any(folder, FOLDERS if several else (*STEPS, *FOLDERS)) for folder in folders)
    return inner and _any(base, (*WEIGHTS, *BESIDE))


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
