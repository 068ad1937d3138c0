#!/usr/bin/env python3
"""A stand-in for PBS's qsub, qstat and qrerun before Slurm: what Debian's wrappers lack of it.

Ids end in `.server`, those of arrays in `[].server`; a script finds PBS_JOBID, PBS_O_WORKDIR, PBS_NODEFILE and
PBS_ARRAY_INDEX; `qrerun` is refused, as PBS refuses it to users, unless PBS_OPERATOR is set.  It is called by one of
these three names.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

BODY = """#!/bin/bash
{directives}
export PBS_JOBID="${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}{ending}" PBS_O_WORKDIR={cwd}
export PBS_ARRAY_INDEX="${{SLURM_ARRAY_TASK_ID-}}" PBS_NODEFILE=$(mktemp)
scontrol show hostnames "$SLURM_JOB_NODELIST" > "$PBS_NODEFILE"
exec bash {script}
"""


def directives(script: Path) -> dict[str, str]:
    """The options in a script: {"-N": "name", "-J": "0-2"}."""
    lines = re.findall(r"^#PBS (-\w+) (.*)$", script.read_text(), re.MULTILINE)
    return {flag: value for flag, value in lines if flag != "-l"}


def qsub(words: list[str]) -> str:
    script = Path(words[-1])
    found = directives(script)
    ending = "[].server" if "-J" in found else ".server"
    lines = [f"#SBATCH --job-name={found['-N']}", f"#SBATCH --output={found['-o'].replace('^array_index^', '%a')}"]
    wrapped = script.with_suffix(".wrapped")
    wrapped.write_text(BODY.format(directives="\n".join(lines), ending=ending, cwd=Path.cwd(), script=script))
    array = ["-J", found["-J"]] if "-J" in found else []
    given = [re.sub(r"(\[\])?\.server", "", word) for word in words[:-1]]
    return shim("qsub", [*given, *array, str(wrapped)]).strip().split(".")[0] + ending


def shim(name: str, words: list[str]) -> str:
    return subprocess.run([f"/usr/bin/{name}", *words], check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    name, words = Path(sys.argv[0]).name, sys.argv[1:]
    if name == "qsub":
        print(qsub(words))
    elif name == "qstat":
        print(shim("qstat", [re.sub(r"(\[\])?\.server", "", word) for word in words]))
    elif os.environ.get("PBS_OPERATOR"):
        subprocess.run(["scontrol", "requeue", words[0].removesuffix(".server")], check=True)
    else:
        sys.exit(f"{name}: Unauthorized Request {os.environ.get('PBS_JOBID')}")


if __name__ == "__main__":
    main()
