"""`make test-upstream`: programs that surgery knows nothing of load what it wrote, and compute the same logits.

    .venv/bin/python -m tests.upstream.run [PROGRAM ...]

Each program is installed from the package index into an environment of its own below .cache/upstream.  A tiny model of
each family is converted to the program's format; the program loads it with its own code on the CPU; its logits must be
those of transformers on the original.  A program that cannot be installed, or a model that it does not run, is skipped
with the reason, which is printed; nothing that was not computed counts as passed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

import surgery
from surgery.formats.topology import ONE_RANK, Topology
from tests import oracle, tiny

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".cache" / "upstream"
IDS = torch.randint(0, 264, (2, 24), generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Case:
    """A tiny family (and changes to it), how it is converted, and, if the program does not run it, why."""

    family: str
    to: str
    options: Mapping[str, str] = field(default_factory=dict)
    topology: Topology = ONE_RANK
    changes: Mapping[str, object] = field(default_factory=dict)
    skip: str = ""

    def __str__(self) -> str:
        sizes = "".join(f" --{n} {x}" for n in ("tp", "pp", "ep") if (x := getattr(self.topology, n)) != 1)
        more = "".join(f" {k}={v if isinstance(v, (int, str)) else '...'}" for k, v in self.changes.items())
        return f"{self.family}{more} --to {self.to}{sizes}" + "".join(f" -O {k}={v}" for k, v in self.options.items())


@dataclass(frozen=True)
class Program:
    """A package of the index, the script that loads with it, and what it has to load."""

    packages: tuple[str, ...]
    script: str
    cases: tuple[Case, ...]


MHA = {"g": 12, "n": 1}
TP2 = Topology(tp=2)
LOCAL = {"spec": "local"}
PROGRAMS: Mapping[str, Program] = {
    "ai2-olmo": Program(
        ("ai2-olmo==0.6.0", "datasets", "pyarrow<21"),  # imports datasets unsaid; wants numpy 1, newer pyarrow 2
        "load_olmo.py",
        (
            Case("olmo", "olmo"),
            Case("olmo", "olmo", {"block_group_size": "3"}),
            Case("olmo", "olmo", {"block_type": "llama"}, changes=MHA),
            Case("olmo2", "olmo"),
            Case("olmo2", "olmo", changes={"tie_word_embeddings": True}),
            Case("llama", "olmo"),
            Case("llama", "olmo", {"block_type": "llama"}, changes={"g": 1, "n": 12}),
            Case("olmoe", "olmo", skip="experts are on the branch that OLMoE was trained on, which is no package"),
        ),
    ),
    "ai2-olmo-core": Program(
        ("ai2-olmo-core==3.0.0",),
        "load_olmo_core.py",
        (
            *(Case(f, "olmo-core") for f in ("olmo", "olmo2", "olmo3", "llama", "llama3", "llama_tied", "mistral",
                                             "qwen3", "mixtral", "qwen3_moe", "olmoe", "flex_olmo")),
            Case("olmo3", "olmo-core", {"shard_size": "100kB"}),
            *(Case(f, "olmo-core", {"experts": "default"}) for f in ("mixtral", "flex_olmo")),
        ),
    ),
    "llama-models": Program(
        ("llama-models==0.3.0", "fairscale==0.4.13"),
        "load_meta.py",
        (
            Case("llama3", "meta"),
            Case("llama3", "meta", topology=TP2),
            Case("llama", "meta", {"embedding": "vocab"}, Topology(tp=4)),
            Case("llama_tied", "meta", changes={"rope_parameters": tiny.LLAMA3}),
            Case("llama_tied", "meta", skip="its code scales every rope by a factor of 8, this model's is 32"),
        ),
    ),
    "megatron-core": Program(
        ("megatron-core==0.16.1",),
        "load_megatron.py",
        (
            *(Case(f, "megatron", LOCAL, TP2) for f in ("llama", "qwen2", "qwen3", "gpt2")),
            *(Case(f, "megatron-dist", LOCAL) for f in ("llama", "llama3", "qwen2", "qwen3", "mixtral",
                                                         "qwen3_moe", "gpt2")),
            Case("mixtral", "megatron", LOCAL),
            Case("mistral", "megatron", LOCAL, skip="windows need Transformer Engine or flash attention"),
        ),
    ),
}  # fmt: skip


def install(name: str, packages: tuple[str, ...]) -> str:
    """Make the program's environment; "" or why that failed."""
    home = HOME / name
    done = home / ".ready"
    if done.is_file() and done.read_text() == " ".join(packages):
        return ""
    print(f"installing {' '.join(packages)} into {home.relative_to(ROOT)}", flush=True)
    venv.create(home, with_pip=True)
    torch_pin = next(x for x in (ROOT / "constraints.txt").read_text().split() if x.startswith("torch=="))
    for wanted in ((torch_pin,), (torch_pin, *packages)):
        run = subprocess.run([home / "bin" / "pip", "install", "-q", *wanted], capture_output=True, text=True)
        if run.returncode:
            return "cannot be installed: " + last(run.stderr)
    done.write_text(" ".join(packages))
    return ""


def last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def check(name: str, program: Program, case: Case, folder: Path) -> str:
    """Convert, load, compare; "" or what is wrong."""
    source = tiny.save(case.family, folder / "hf", **case.changes)
    surgery.convert(source, folder / "out", to=case.to, topology=case.topology, options=dict(case.options),
                    vocab_size=tiny.SIZES["v"] if case.to == "hf" else None)  # fmt: skip
    torch.save(IDS, folder / "ids.pt")
    python, script = HOME / name / "bin" / "python", Path(__file__).parent / program.script
    words = [python, "-W", "ignore", script, folder / "out", folder / "ids.pt", folder / "logits.pt"]
    run = subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=600)
    if run.returncode:
        return last(run.stderr)
    gap = oracle.gap(torch.load(folder / "logits.pt", weights_only=True), oracle.hf_logits(source, IDS))
    return "" if gap < 1e-4 else f"logits differ by {gap:.1e} of their standard deviation"


def results(names: list[str]) -> Iterator[tuple[str, str, str]]:
    """(verdict, what, why) of everything."""
    for name in names:
        program = PROGRAMS[name]
        if why := install(name, program.packages):
            yield "skip", name, why
            continue
        for case in program.cases:
            if case.skip:
                yield "skip", f"{name}: {case}", case.skip
                continue
            with tempfile.TemporaryDirectory() as tmp:
                why = check(name, program, case, Path(tmp))
            yield "FAIL" if why else "ok", f"{name}: {case}", why


def main(names: list[str]) -> int:
    counts = {"ok": 0, "skip": 0, "FAIL": 0}
    for verdict, what, why in results(names or list(PROGRAMS)):
        counts[verdict] += 1
        print(f"{verdict:4}  {what}{': ' if why else ''}{why}", flush=True)
    print(f"{counts['ok']} loaded with equal logits, {counts['FAIL']} failed, {counts['skip']} skipped")
    return 1 if counts["FAIL"] or not counts["ok"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
