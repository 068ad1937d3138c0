"""OLMo-core reads the documents and label masks that `surgery data tokenize` wrote.

    .venv/bin/python -m tests.upstream.tokens [PYTHON]

PYTHON: one that has ai2-olmo-core; by default the environment that `tests.upstream.run` makes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from surgery.cli.main import main as surgery
from tests.upstream.run import ROOT, last, python_for

NAME = "ai2-olmo-core"
GOLDEN = ROOT / "tests" / "golden"
LENGTH = 32


def make(folder: Path) -> list[tuple[list[int], list[int]]]:
    """Conversations in dolma's format, in several files; their ids and masks as trl makes them."""
    chat = json.loads((GOLDEN / "chat" / "masks.json").read_text())
    held = chat["conversations"]
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": c["messages"]}) + "\n" for c in held))
    (folder / "template.jinja").write_text(chat["chat_template"])
    words = ["data", "tokenize", folder / "chat.jsonl", folder / "out", "--format", "dolma", "--max-size", 200]
    more = ["--messages-key", "messages", "--chat-template", folder / "template.jinja"]
    words += [*more, "--tokenizer", GOLDEN / "tokenize" / "tokenizer.json"]
    surgery([str(word) for word in words], standalone_mode=False)
    return [(c["input_ids"], c["assistant_mask"]) for c in held]


def instances(folder: Path, suffix: str, dtype: str) -> list[list[int]]:
    """Each file cut into pieces of one length, the rest dropped: what OLMo-core calls fixed sequence length."""
    files = [np.fromfile(p.with_suffix(suffix), dtype) for p in sorted(folder.glob("*.npy"))]
    return [row for ids in files for row in ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH).tolist()]


def main(python: str | None = None) -> int:
    python = python or python_for(NAME)
    if python is None:
        return 1
    with tempfile.TemporaryDirectory() as tmp:
        folder, script = Path(tmp), Path(__file__).with_name("load_olmo_core_data.py")
        held = make(folder)
        words = [python, "-W", "ignore", str(script), str(folder / "out"), str(folder / "out.json")]
        run = subprocess.run(words, capture_output=True, text=True, timeout=900)
        if run.returncode:
            print(f"FAIL  {NAME}: {last(run.stderr)}")
            return 1
        read = json.loads((folder / "out.json").read_text())
        results = {
            "documents": sorted(read["documents"]) == sorted(ids for ids, _ in held),
            "instances": read["input_ids"] == instances(folder / "out", ".npy", "<u2"),
            "label masks": read["label_mask"] == instances(folder / "out", ".mask", "?"),
            "some tokens are learnt": 0 < sum(map(sum, read["label_mask"])) < LENGTH * len(read["label_mask"]),
        }
    for what, right in results.items():
        print(f"{'ok' if right else 'FAIL':4}  {NAME}: {what}")
    return int(not all(results.values()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
