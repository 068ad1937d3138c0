"""What batch scripts need to know of a site: `launch.yaml`.

account: llm
partition: gpu
modules: [cuda/12.8]
setup: source ~/venv/bin/activate

site = read_site("launch.yaml")             # ConfigError with the key that is wrong
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.containers.text import YAML_LIMIT
from surgery.containers.yaml_loader import parse_yaml
from surgery.errors import ConfigError
from surgery.jobs.problems import Problems
from surgery.settings import Checked, keywords, make, setting
from surgery.tensors.files import read_small

NAME = "launch.yaml"


@dataclass(frozen=True, kw_only=True)
class Site(Checked):
    """All that is the same for every job of a site."""

    scheduler: str = setting("", "The scheduler, so that --scheduler need not say it.", choices=("", "slurm", "pbs"))
    account: str = setting("", "Who pays: Slurm's account, the project of PBS.")
    partition: str = setting("", "Slurm's partition, the queue of PBS.")
    directives: tuple[str, ...] = setting((), "More options of the scheduler, one each: --qos=high.")
    modules: tuple[str, ...] = setting((), "Loaded with `module load`.")
    setup: str = setting("", "Lines for bash, before the step begins.")
    container: str = setting("", "What runs a command in a container: apptainer exec --nv image.sif.")
    python: str = setting("", "Python with surgery, there. [default: the one that runs now]")
    per_node: str = setting("", "What starts a command once on each node of a job. [default: srun, or mpirun for PBS]")
    grace: int = setting(300, "Seconds before the time limit at which a step is asked to stop.", low=1)
    requeue: bool = setting(True, "Queue a job again that the time limit stopped.")
    arrays: int = setting(8, "From so many runs of one step on, its jobs are one array.", low=2)
    template: str = setting("", "A script of your own, relative to this file; `surgery launch --show-template`.")

    @property
    def surgery(self) -> str:
        """How surgery is started, as a shell reads it."""
        return f"{self.container} {self.interpreter} -m surgery".strip()

    @property
    def interpreter(self) -> str:
        return self.python or shlex.quote(sys.executable)


def read_site(path: str | os.PathLike[str] | None = None) -> Site:
    """The site in a file; else that of launch.yaml in the working folder; else one of which nothing is known.

    Raises FileError or ConfigError.
    """
    if path is None and not Path(NAME).exists():
        return Site()
    path = Path(path or NAME)
    value = parse_yaml(read_small(path, YAML_LIMIT, "site"), os.fspath(path), "site")
    if not isinstance(value, dict):
        raise ConfigError("is no site: keys and values are wanted", file=path)
    problems, site = Problems(path), Site()
    with problems.at(""):
        site = make(Site, keywords(Site, value))
    problems.check()
    return replace(site, template=os.path.join(path.resolve().parent, site.template)) if site.template else site
