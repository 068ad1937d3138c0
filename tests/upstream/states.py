"""OLMo, OLMo-core and GPT-NeoX go on from states that surgery wrote as from their own: three updates, bit for bit.

    .venv/bin/python -m tests.upstream.states [PROGRAM=PYTHON ...]

PYTHON: one that has the program; by default the environments that `tests.upstream.run` makes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import surgery
from surgery.errors import SurgeryError
from surgery.formats.topology import Topology
from tests import oracle
from tests.upstream.run import environment, last, python_for

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "optimizer"
Run = Callable[..., None]


def there_and_back(source: Path, through: str, to: str, folder: Path, **options: str) -> Path:
    surgery.convert(source, folder / "there", to=through, optimizer=True, options=options)
    surgery.convert(folder / "there", folder / "back", to=to, optimizer=True)
    return folder / "back"


def same_and_loaded(own: torch.Tensor, ours: torch.Tensor) -> bool:
    """NaN is what a weight is before the program loads it."""
    return oracle.same_bits(own, ours) and not bool(own.isnan().any())


def olmo(run: Run, folder: Path) -> Iterator[tuple[str, Path, Path]]:
    """(what, the program's own continuation, the one from ours)."""
    (folder / "own").mkdir()
    run("continue_olmo.py", "make", folder / "own")
    for layout, ranks in (("unsharded", 1), ("torch_new", 2), ("local", 2)):
        ours = there_and_back(folder / "own" / layout, "olmo-core", "olmo", folder / layout)
        run("continue_olmo.py", "go", ours, folder / f"{layout}.pt")
        yield f"{layout} by OLMo-core", folder / "own" / f"{ranks}.pt", folder / f"{layout}.pt"


def olmo_core(run: Run, folder: Path) -> Iterator[tuple[str, Path, Path]]:
    own = GOLDEN / "olmo-core"
    run("continue_olmo_core.py", own, folder / "own.pt", "plain")
    for through, options in (("olmo", {}), ("hf", {"optimizer": "fsdp"})):
        ours = there_and_back(own, through, "olmo-core", folder / through, **options)
        run("continue_olmo_core.py", ours, folder / f"{through}.pt", "trainer")
        yield f"its own by {through}", folder / "own.pt", folder / f"{through}.pt"


def neox(run: Run, folder: Path) -> Iterator[tuple[str, Path, Path]]:
    """Two tensor-parallel ranks; a universal checkpoint, and an optimizer that counts as DeepSpeed's or as Apex's."""
    own, ours = GOLDEN / "neox-zero1", folder / "ours"
    run("continue_neox.py", own, folder / "own.pt", "zero", "deepspeed")
    options = {"release": "2024-11", "optimizer": "fsdp"}
    surgery.convert(own, folder / "hf", to="hf", optimizer=True, options=options)
    surgery.convert(folder / "hf", ours, to="neox", optimizer=True, dtype="bfloat16", topology=Topology(tp=2, pp=0))
    for counts in ("deepspeed", "apex"):
        run("continue_neox.py", ours, folder / f"{counts}.pt", "universal", counts)
        yield f"universal by Hugging Face, counted by {counts}", folder / "own.pt", folder / f"{counts}.pt"


CASES = {"ai2-olmo": olmo, "ai2-olmo-core": olmo_core, "gpt-neox": neox}


def main(given: dict[str, str]) -> int:
    wrong = 0
    for name, cases in CASES.items():
        python = given.get(name) or python_for(name)
        if python is None:
            continue

        def run(script: str, *words: object, python: str = python, name: str = name) -> None:
            command = [python, "-W", "ignore", str(Path(__file__).parent / script), *map(str, words)]
            done = subprocess.run(command, env=environment(name), capture_output=True, text=True, timeout=600)
            if done.returncode:
                raise RuntimeError(last(done.stderr))

        with tempfile.TemporaryDirectory() as tmp:
            try:
                for what, own, ours in cases(run, Path(tmp)):
                    a, b = (torch.load(path, weights_only=True) for path in (own, ours))
                    same = a.keys() == b.keys() and all(same_and_loaded(a[n], b[n]) for n in a)
                    print(f"{'ok  ' if same else 'FAIL'}  {name}: {what}", flush=True)
                    wrong += not same
            except (RuntimeError, SurgeryError) as error:
                print(f"FAIL  {name}: {error}")
                wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(dict(word.split("=", 1) for word in sys.argv[1:])))
