"""What every loading script does with each folder that it is given: the program's logits, or why there are none.

    each(lambda checkpoint, ids: load(checkpoint)(ids))        # python load_olmo.py FOLDER ...

FOLDER has a checkpoint, `out`, and tokens, `ids.pt`; it gets `logits.pt`, or `why.txt` with the error's own words.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch


def each(load: Callable[[Path, torch.Tensor], torch.Tensor]) -> None:
    for folder in map(Path, sys.argv[1:]):
        try:
            with torch.no_grad():
                torch.save(load(folder / "out", torch.load(folder / "ids.pt")).float(), folder / "logits.pt")
        except Exception as error:
            traceback.print_exc()
            (folder / "why.txt").write_text(f"{type(error).__name__}: {error}")
