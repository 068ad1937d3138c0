"""`make test-upstream`: programs that surgery knows nothing of load what it wrote, and compute the same logits.

    .venv/bin/python -m tests.upstream.run [PROGRAM ...]

Each program is installed from the package index into an environment of its own below .cache/upstream, and one that is
no package is fetched there by git.  A tiny model of
each family is converted to the program's format; the program loads it with its own code on the CPU; its logits must be
those of transformers on the original.  A program that cannot be installed, or a model that it does not run, is skipped
with the reason, which is printed; nothing that was not computed counts as passed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

import surgery
from surgery.errors import SurgeryError
from tests import oracle, tiny
from tests.upstream.programs import PROGRAMS, SOUP, TARGETS, Case, Program

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".cache" / "upstream"
IDS = torch.randint(0, 264, (2, 24), generator=torch.Generator().manual_seed(3))
LIMIT = 1e-4  # standard deviations of the logits


def python_of(name: str) -> Path:
    """The program's own python."""
    return HOME / name / "bin" / "python"


def fetch(name: str) -> str:
    """Get the checkout of a program that is no package, unless its variable names one; "" or why that failed."""
    source, home = PROGRAMS[name].source, HOME / name / "source"
    if source is None or source.variable in os.environ:
        return ""
    head = subprocess.run(["git", "-C", home, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    if head == source.commit and (home / ".git" / "index").is_file():
        return ""
    home.mkdir(parents=True, exist_ok=True)
    for step in (("init",), ("fetch", "--depth=1", source.address, source.commit), ("checkout", "FETCH_HEAD")):
        run = subprocess.run(["git", "-C", home, step[0], "-q", *step[1:]], capture_output=True, text=True)
        if run.returncode:
            shutil.rmtree(home)
            return f"is no package, and cannot be fetched ({source.variable} may name a checkout): {last(run.stderr)}"
    return ""


def install(name: str) -> str:
    """Make the program's environment; "" or why that failed."""
    if why := fetch(name):
        return why
    program, home = PROGRAMS[name], HOME / name
    without = [f"without {package}" for package in program.without]
    done, wanted = home / ".ready", " ".join([*program.packages, *without, program.python]).strip()
    if done.is_file() and done.read_text() == wanted:
        return ""
    print(f"installing {' '.join(program.packages)} into {home.relative_to(ROOT)}", flush=True)
    torch_pin = next(x for x in (ROOT / "constraints.txt").read_text().split() if x.startswith("torch=="))
    python, pip = f"python{program.python}" if program.python else sys.executable, (home / "bin" / "pip", "-q")
    installs = [(*pip, "install", torch_pin), (*pip, "install", torch_pin, *program.packages)]
    uninstalls = [(*pip, "uninstall", "-y", *program.without)] if program.without else []
    for step in [(python, "-m", "venv", home), *installs, *uninstalls]:
        try:
            run = subprocess.run(step, capture_output=True, text=True)
        except FileNotFoundError:
            return f"needs {step[0]}, which is not here"
        if run.returncode:
            return "cannot be installed: " + last(run.stderr)
    done.write_text(wanted)
    return ""


def python_for(name: str) -> str | None:
    """The program's own python, once it is installed; None, and a word, where that fails."""
    if why := install(name):
        print(f"skip  {name}: {why}")
        return None
    return str(python_of(name))


def environment(name: str) -> dict[str, str]:
    """Variables of this process, and where the source of a program lies that is no package."""
    source = PROGRAMS[name].source
    return ({source.variable: str(HOME / name / "source")} if source else {}) | os.environ


def last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def make(case: Case, folder: Path) -> Path:
    """Write what the program loads as `folder/out`, and give the tiny model that it came from."""
    origin = source = tiny.save(case.family, folder / "hf", **case.changes)
    out = folder / "out"
    if case.by == SOUP:
        shutil.copytree(source, folder / "copy")
        models = [{"model": str(m), "parameters": {"weight": 0.5}} for m in (source, folder / "copy")]
        surgery.soup({"merge_method": "linear", "dtype": "float32", "models": models}, out, sync=False)
        return origin
    if case.by in TARGETS:
        surgery.upcycle(source, out, target=case.by, experts=4, top_k=2, strategy="copy", verify_tokens=0, sync=False)
        return origin
    if case.by:
        surgery.convert(source, folder / "between", to=case.by, sync=False)
        source = folder / "between"
    surgery.convert(source, out, to=case.to, topology=case.topology, options=dict(case.options), sync=False,
                    vocab_size=tiny.SIZES["v"] if case.to == "hf" else None)  # fmt: skip
    return origin


def load(name: str, program: Program, folders: list[Path]) -> str:
    """Let the program load all that was made; the last line that it said."""
    words = [python_of(name), "-W", "ignore", Path(__file__).parent / program.script, *folders]
    try:
        run = subprocess.run(
            [str(w) for w in words], env=environment(name), capture_output=True, text=True, timeout=1800
        )
    except subprocess.TimeoutExpired:
        return "took more than half an hour"
    return last(run.stderr)


def compared(folder: Path, want: torch.Tensor, said: str) -> str:
    """What is wrong with what the program computed; "" if nothing."""
    if (folder / "why.txt").is_file():
        return last((folder / "why.txt").read_text())
    if not (folder / "logits.pt").is_file():
        return f"ended before it came to this: {said}"
    gap = oracle.gap(torch.load(folder / "logits.pt", weights_only=True), want)
    return "" if gap < LIMIT else f"logits differ by {gap:.1e} of their standard deviation"


def results(names: list[str]) -> Iterator[tuple[str, str, str]]:
    """(verdict, what, why) of everything."""
    for name in names:
        program = PROGRAMS[name]
        if why := install(name):
            yield "skip", name, why
            continue
        yield from (("skip", f"{name}: {case}", case.skip) for case in program.cases if case.skip)
        with tempfile.TemporaryDirectory() as tmp:
            made: list[tuple[Case, Path, torch.Tensor]] = []
            for n, case in enumerate(case for case in program.cases if not case.skip):
                folder = Path(tmp) / str(n)
                try:
                    made.append((case, folder, oracle.hf_logits(make(case, folder), IDS)))
                except SurgeryError as error:
                    yield "FAIL", f"{name}: {case}", str(error)
                torch.save(IDS, folder / "ids.pt")
            said = load(name, program, [folder for _, folder, _ in made])
            for case, folder, want in made:
                why = compared(folder, want, said)
                yield "FAIL" if why else "ok", f"{name}: {case}", why


def main(names: list[str]) -> int:
    if unknown := [name for name in names if name not in PROGRAMS]:
        print(f"no such program: {', '.join(unknown)}; there are {', '.join(PROGRAMS)}")
        return 2
    counts = {"ok": 0, "skip": 0, "FAIL": 0}
    for verdict, what, why in results(names or list(PROGRAMS)):
        counts[verdict] += 1
        print(f"{verdict:4}  {what}{': ' if why else ''}{why}", flush=True)
    print(f"{counts['ok']} loaded with equal logits, {counts['FAIL']} failed, {counts['skip']} skipped")
    return 1 if counts["FAIL"] or not counts["ok"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
