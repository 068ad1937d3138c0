"""Tokens a second of `surgery data tokenize`, against the tokenizers library called directly, and Megatron's way.

    python bench/data_tokenize.py --dir /tmp/bench                                # the tokenizer of `make demo`
    python bench/data_tokenize.py --dir /tmp/bench --tokenizer MODEL --megabytes 400 --workers 16 --runs 5

direct:   as many processes, each a loop that reads lines of JSON and calls `encode_batch_fast` for 64 at a time; the
          ids become an array and are thrown away.  Nothing is checked, ordered or written.
megatron: a document at a time through transformers, lists of ids sent to one process that writes them: the way of
          Megatron-LM's tools/preprocess_data.py.

The programs take turns, so that a busy machine disturbs all alike; ratios are medians over the turns.  On a machine
that others use, tokens per second of processor time tell more.  `peak` is of the largest process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from timing import Result, timed

TOGETHER = 64  # documents
EMPTY = "import numpy, tokenizers, surgery.cli.main, surgery.data.tokenizing.tokenize"


def make(path: Path, megabytes: int) -> None:
    """Lines of JSON with the Python sources of the installation, in pieces of 4000 characters."""
    files = sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))
    random.Random(1).shuffle(files)
    size = number = 0
    with path.open("w") as out:
        while size < megabytes * 10**6:
            for file in files:
                text = file.read_text(errors="ignore")
                for at in range(0, len(text), 4000):
                    line = json.dumps({"id": str(number), "text": text[at : at + 4000]}) + "\n"
                    size += out.write(line)
                    number += 1
                if size >= megabytes * 10**6:
                    break


def lines_of(path: str, first: int, step: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if number % step == first:
                yield line


def loop(path: str, tokenizer: str, first: int, step: int) -> int:
    """What one process of `direct` does; the number of tokens."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import numpy as np
    from tokenizers import Tokenizer

    encoder, total, texts = Tokenizer.from_file(f"{tokenizer}/tokenizer.json"), 0, list[str]()

    def encoded() -> int:
        arrays = [np.array(e.ids, np.uint16) for e in encoder.encode_batch_fast(texts, add_special_tokens=False)]
        texts.clear()
        return sum(map(len, arrays))

    for line in lines_of(path, first, step):
        texts.append(json.loads(line)["text"])
        if len(texts) == TOGETHER:
            total += encoded()
    return total + (encoded() if texts else 0)


def direct(path: str, tokenizer: str, workers: int) -> int:
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return sum(pool.starmap(loop, [(path, tokenizer, i, workers) for i in range(workers)]))


HELD: list[object] = []  # the tokenizer of a worker of `megatron`


def begin(tokenizer: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    HELD.append(AutoTokenizer.from_pretrained(tokenizer))


def document(line: bytes) -> tuple[list[int], int]:
    ids = HELD[0](json.loads(line)["text"], add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    return ids, len(line)


def megatron(path: str, tokenizer: str, workers: int) -> int:
    import numpy as np

    total = 0
    with (
        multiprocessing.get_context("spawn").Pool(workers, begin, (tokenizer,)) as pool,
        open(f"{path}.bin", "wb") as out,
    ):
        for ids, _ in pool.imap(document, lines_of(path, 0, 1), 32):
            out.write(np.array(ids, np.uint16).tobytes())
            total += len(ids)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dir", type=Path, required=True, help="an existing folder on the disk to measure")
    parser.add_argument("--tokenizer", default=".cache/models/SmolLM2-135M-Instruct", help="a folder")
    parser.add_argument("--megabytes", type=int, default=24, help="of text; a second run has four times as much")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    folder = args.dir / "data_tokenize"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    text, large, out = folder / "text.jsonl", folder / "large.jsonl", folder / "out"
    make(text, args.megabytes)
    make(large, 4 * args.megabytes)

    def ours(source: Path) -> list[str]:
        words = ["data", "tokenize", source, out, "--force", "--json", "--no-append-eos", "--tokenizer", args.tokenizer]
        return [sys.executable, "-m", "surgery", *map(str, words), "--workers", str(args.workers)]

    def other(name: str) -> list[str]:
        return [sys.executable, __file__, name, str(text), args.tokenizer, str(args.workers)]

    results = {name: Result() for name in ("surgery", "direct", "megatron", "four times the text", "imports")}
    tokens = 0
    for _ in range(args.runs):
        counts = {int(timed(other(name), results[name])) for name in ("direct", "megatron")}
        tokens = json.loads(timed(ours(text), results["surgery"]))["tokens"]
        assert counts == {tokens}, (counts, tokens)
    timed(ours(large), results["four times the text"])
    timed([sys.executable, "-c", EMPTY], results["imports"])
    report(results, tokens, args.workers)
    shutil.rmtree(folder)


def report(results: dict[str, Result], tokens: int, workers: int) -> None:
    print(f"{tokens:,} tokens, {workers} processes, {len(results['surgery'].wall)} runs")
    for name in ("surgery", "direct", "megatron"):
        result = results[name]
        wall, cpu = (tokens / statistics.median(x) for x in (result.wall, result.cpu))
        print(f"{name:9} {wall:10,.0f} tokens/s {cpu:10,.0f} per processor second, peak {max(result.peak) >> 20} MiB")
    for name in ("direct", "megatron"):
        pairs = [(results[name].wall, results["surgery"].wall), (results[name].cpu, results["surgery"].cpu)]
        wall, cpu = (statistics.median(a / b for a, b in zip(x, y, strict=True)) for x, y in pairs)
        print(f"surgery / {name}: {wall:.2f} by the clock, {cpu:.2f} by processor time")
    small, large = (max(results[name].peak) >> 20 for name in ("surgery", "four times the text"))
    print(
        f"peak: {small} MiB, of four times the text {large} MiB; imports alone {results['imports'].peak[0] >> 20} MiB"
    )


if __name__ == "__main__":
    if sys.argv[1:2] in (["direct"], ["megatron"]):
        name, source, folder, count = sys.argv[1:]
        print({"direct": direct, "megatron": megatron}[name](source, folder, int(count)))
    else:
        main()
