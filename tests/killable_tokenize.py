"""Runs of `surgery data tokenize` that are killed and repeated: see test_data_tokenize_kill.py.

python killable_tokenize.py calls FOLDER megatron      # SIGKILL before and after every call that changes something
python killable_tokenize.py random FOLDER dolma 40     # SIGKILL at random times
"""

import gzip
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from surgery.data.tokenizing import text, tokenize
from surgery.data.tokenizing.bad_lines import Limit
from surgery.data.tokenizing.prepare import Choices, settings_for
from surgery.data.tokenizing.sources import find_sources
from surgery.data.tokenizing.vocabulary import load_vocabulary
from tests.killing import dies_at, forked, tree

GOLDEN = Path(__file__).parent / "golden" / "tokenize"
CHOICES = {
    "megatron": Choices(eos="0", max_size=900),
    "dolma": Choices(format="dolma", eos="0", max_size=900, ring=2, batch=7),
    "messages": Choices(messages="messages", template="template.jinja"),
}
VOCABULARY = load_vocabulary(str(GOLDEN / "tokenizer.json"))


def prepare(folder, kind):
    """Small files of each packing, with bad lines and a file that does not unpack."""
    os.chdir(folder)
    source = Path("source")
    source.mkdir(exist_ok=True)
    chat = json.loads((GOLDEN.parent / "chat" / "masks.json").read_text())
    Path("template.jinja").write_text(chat["chat_template"])
    held = b"".join(gzip.decompress(p.read_bytes()) for p in sorted(GOLDEN.glob("documents/*.gz")))
    conversations = [{"messages": c["messages"]} for c in chat["conversations"]]
    texts = held.decode().splitlines()[:30]
    lines = [json.dumps(c) for c in conversations] if kind == "messages" else texts
    third = len(lines) // 3
    Path("source/a.jsonl").write_text("\n".join([*lines[:third], "no json", ""]))
    Path("source/b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[third : 2 * third]).encode(), mtime=0))
    Path("source/c.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0)[:-9])
    Path("source/d.jsonl").write_text("\n".join(lines[2 * third :]))
    for path in source.iterdir():
        os.utime(path, (1, 1))


def run(kind, dst="out", block=2000):
    """The job, in this process; blocks are so small that there are many, and each has its line in the journal."""
    text.BLOCK, tokenize.PATIENCE = block, 0
    sources, _ = find_sources(["source"])
    settings = settings_for(CHOICES[kind], VOCABULARY)
    options = {"workers": 1, "max_bad": Limit.parse("99%"), "checkpoint": 0.0, "durable": False}
    return tokenize.tokenize(sources, Path(dst), VOCABULARY, settings, **options)


def finished(kind, dst="out"):
    """Run to the end, in a process of its own."""
    status = os.waitpid(forked(lambda: run(kind, dst)), 0)[1]
    assert status == 0, status


def same(whole, where):
    there = tree(Path("out"))
    different = [name for name in whole.keys() | there.keys() if whole.get(name) != there.get(name)]
    assert different == [], (where, different)


def kill_at_every_call(kind):
    finished(kind, "whole")
    whole, kills, resumed = tree(Path("whole")), 0, 0
    for after in (False, True):
        for n in range(1, 10_000):

            def job(n=n, after=after):
                dies_at(n, after)
                run(kind)

            status = os.waitpid(forked(job), 0)[1]
            if status == 0:
                break
            assert status == signal.SIGKILL, status
            kills += 1
            assert not Path("out").exists() or tree(Path("out")) == whole, (n, after)
            if not Path("out").exists():
                resumed += Path(".out.surgery-partial/data").exists()
                finished(kind)
            same(whole, (n, after))
            shutil.rmtree("out")
        shutil.rmtree("out")
    return {"kills": kills, "resumed": resumed}


def kill_at_random(kind, kills):
    began = time.monotonic()
    finished(kind, "whole")
    whole, span, chance = tree(Path("whole")), time.monotonic() - began, random.Random(5)
    done = completed = 0
    while done < kills:
        pid = forked(lambda: run(kind))
        time.sleep(chance.random() * span)
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert status in (0, signal.SIGKILL), status
        done += status == signal.SIGKILL
        if Path("out").exists():
            assert tree(Path("out")) == whole
            shutil.rmtree("out")
            completed += 1
    finished(kind)
    assert tree(Path("out")) == whole
    return {"kills": done, "completed": completed + 1}


if __name__ == "__main__":
    mode, folder, kind, *rest = sys.argv[1:]
    prepare(folder, kind)
    outcome = kill_at_every_call(kind) if mode == "calls" else kill_at_random(kind, int(rest[0]))
    print(json.dumps(outcome), flush=True)
