"""`surgery run` whose steps are forks of one process that has imported torch: their commands, without an import each.

python -m tests.forked_steps recipes/quickstart.yaml -v        # in place of: surgery run recipes/quickstart.yaml -v
"""

from __future__ import annotations

import importlib
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from surgery.cli.main import COMMANDS, main
from surgery.jobs.process import Children

IMPORTED = ("torch", "transformers", "transformers.models.llama", "surgery.running.whole", "surgery.midtraining.loop")


def forked(
    _: Children, words: Sequence[str], log: Path, stdout: BinaryIO | None, lock: int, env: Mapping[str, str]
) -> int:
    """What `Children.run` does: a command of Python as a fork, one of bash as a process."""
    if words[0] != sys.executable:
        with open(log, "ab") as told:
            return subprocess.call(words, stdout=stdout or told, stderr=told, env=dict(env))
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        with open(log, "ab") as told:
            os.dup2((stdout or told).fileno(), 1)
            os.dup2(told.fileno(), 2)
        os.environ.clear()
        os.environ.update(env)
        _python(words[1:])
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _python(words: Sequence[str]) -> None:
    """`python -m surgery ...`, or a script with its words."""
    if [*words[:2]] == ["-m", "surgery"]:
        main([*words[2:]], prog_name="surgery")
    else:
        sys.argv = [*words]
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    for name in (*IMPORTED, *(f"surgery.cli.{module}" for module, _ in COMMANDS.values())):
        importlib.import_module(name)
    Children.run = forked  # type: ignore[method-assign]
    main(["run", *sys.argv[1:]], prog_name="surgery")
