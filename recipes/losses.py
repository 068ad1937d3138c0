"""Print the loss of several Hugging Face models on one text, and which is the lowest.

python recipes/losses.py recipes/prose.txt model-1/ model-2/ soup/
"""

from __future__ import annotations

import sys
from pathlib import Path

from surgery.running.loss import loss_of

TOKENS = 256  # seconds on a CPU, and enough to tell these models apart


def main(text: str, *folders: str) -> None:
    losses = {folder: loss_of(Path(folder), Path(text), TOKENS, None) for folder in folders}
    for folder, loss in losses.items():
        print(f"  {loss:.4f}  {folder}")
    print(f"The lowest of the {len(losses)}: {min(losses, key=lambda folder: losses[folder])}")


if __name__ == "__main__":
    main(*sys.argv[1:])
