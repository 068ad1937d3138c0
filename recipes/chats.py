"""Make prompts with completions, and preferences, of a file of texts: what the small twins are fine-tuned on.

    python recipes/chats.py corpus/prose.jsonl chats.jsonl pairs.jsonl

The prompt is a text's first line, the completion what follows; the rejected completion is that of another text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

MOST = 400  # texts
LONGEST = 160  # characters of each side, which fit into short rows


def halves(source: Path) -> list[tuple[str, str]]:
    """First lines and what follows them, of texts that have both."""
    found = []
    for line in source.read_text(encoding="utf-8").splitlines():
        first, _, rest = json.loads(line)["text"].partition("\n")
        if first.strip() and len(rest.strip()) > LONGEST // 2:
            found.append((first.strip()[:LONGEST], rest.strip()[:LONGEST]))
    return found[:MOST]


def main(source: Path, chats: Path, pairs: Path) -> None:
    found = halves(source)
    with chats.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in found)
    others = [c for _, c in found[1:] + found[:1]]
    with pairs.open("w", encoding="utf-8") as file:
        for (prompt, chosen), rejected in zip(found, others, strict=True):
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
    print(f"{len(found)} prompts")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
