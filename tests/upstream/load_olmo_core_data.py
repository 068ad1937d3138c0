"""Reads with OLMo-core what `surgery data tokenize --format dolma` wrote.

.cache/upstream/ai2-olmo-core/bin/python tests/upstream/load_olmo_core_data.py FOLDER OUT.json

OUT: the documents by their .csv.gz, and the ids and label masks of all instances of 32 tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from olmo_core.data import NumpyFSLDataset
from olmo_core.data.utils import iter_document_indices

LENGTH = 32


def main(folder: str, out: str) -> None:
    paths = sorted(str(p) for p in Path(folder).glob("*.npy"))
    masks = [str(Path(p).with_suffix(".mask")) for p in paths]
    documents = [np.fromfile(p, np.uint16)[a:b].tolist() for p in paths for a, b in iter_document_indices(p)]
    options = {"sequence_length": LENGTH, "pad_token_id": 1, "eos_token_id": 0, "vocab_size": 600, "dtype": np.uint16}
    dataset = NumpyFSLDataset(*paths, label_mask_paths=masks, **options)
    rows = [dataset[i] for i in range(len(dataset))]
    held = {key: [row[key].tolist() for row in rows] for key in ("input_ids", "label_mask")}
    Path(out).write_text(json.dumps({"documents": documents, **held}))


if __name__ == "__main__":
    main(*sys.argv[1:])
