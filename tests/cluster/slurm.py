"""A Slurm of one node, from Debian's packages, in a folder of its own; it needs root, but no systemd and no database.

with running_slurm(folder) as env:
    subprocess.run(["sinfo"], env=env)
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
CONFIG = """\
ClusterName=toy
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={daemon_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,requeue_setup_env_fail
DependencyParameters={dependencies}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.txt
MpiDefault=none
ReturnToService=2
MinJobAge=300
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=2000 State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
# a step that needs two jobs: when it is told to stop it leaves a checkpoint, from which the second goes on
SLOW = """
import pathlib, signal, sys, time
def stop(*_):
    pathlib.Path("checkpoint").touch()
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
with open("attempts", "a") as file:
    file.write("begun\\n")
if not pathlib.Path("checkpoint").exists():
    time.sleep(600)
pathlib.Path(sys.argv[1]).write_text("done")
"""


def available() -> bool:
    return os.geteuid() == 0 and all(shutil.which(name) for name in PROGRAMS)


@contextmanager
def running_slurm(folder: Path, kills_children: bool = False) -> Iterator[Mapping[str, str]]:
    """The environment in which its commands find it.  `kills_children`: jobs whose parent failed leave the queue."""
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    ports = dict(zip(("port", "daemon_port"), _free_ports(2), strict=True))
    config = folder / "slurm.conf"
    dependencies = "kill_invalid_depend" if kills_children else "disable_remote_singleton"
    host = socket.gethostname().split(".")[0]
    config.write_text(CONFIG.format(folder=folder, host=host, cpus=os.cpu_count(), dependencies=dependencies, **ports))
    env = os.environ | {"SLURM_CONF": str(config)}
    munge = ["munged", f"--key-file={key}", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid",
             f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed", "--force"]  # fmt: skip
    try:
        for words in (munge, ["slurmctld"], ["slurmd"]):
            subprocess.run(words, env=env, check=True, timeout=60)
        _until(lambda: "idle" in _said(["sinfo", "--noheader", "--format=%t"], env))
        yield env
    finally:
        for name in ("slurmd", "slurmctld", "munge"):
            with suppress(OSError, ValueError):
                os.kill(int((folder / f"{name}.pid").read_text()), signal.SIGTERM)


def _said(words: list[str], env: Mapping[str, str]) -> str:
    return subprocess.run(words, env=env, capture_output=True, text=True, check=False, timeout=60).stdout


def _until(holds, seconds=60.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "Slurm does not come up"
        time.sleep(0.2)


def _free_ports(many: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(many)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
