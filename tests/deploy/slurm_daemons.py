"""A Slurm of one machine for tests: munged, slurmctld and slurmd of this user, on loopback, all below one folder."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy_files import free_port, until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "squeue", "sinfo")
SYSTEM = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
N_GPUS = 4

# CPUs, memory and GPUs are what the batch script asks of a node, whatever this machine has (config_overrides).
CONF = """
ClusterName=haloseg
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=5
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=32 RealMemory=262144 Gres=gpu:{n_gpus}
PartitionName=gpu Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """A cluster that takes jobs: the environment in which its commands find it."""

    folder: Path
    environment: dict[str, str]

    def told(self, *words: str | Path) -> str:
        """Return what one of Slurm's commands prints."""
        done = subprocess.run(
            [*map(str, words)], env=self.environment, cwd=self.folder, capture_output=True, text=True, check=False,
            timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def jobs(self) -> list[str]:
        return self.told("squeue", "--noheader", "--format=%i").split()


def missing() -> str:
    """Return the first of Slurm's programs that is not here, or nothing."""
    return next((name for name in PROGRAMS if shutil.which(name, path=SYSTEM) is None), "")


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Run the three daemons for as long as the block runs; whatever they started ends with them."""
    host = socket.gethostname().partition(".")[0]
    for name in ("state", "spool", "run"):
        (folder / name).mkdir(mode=0o700)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    ports = (free_port(), free_port())
    text = CONF.format(host=host, user=getpass.getuser(), folder=folder, ports=ports, n_gpus=N_GPUS)
    (folder / "slurm.conf").write_text(text)
    files = "".join(f"Name=gpu File=/dev/tty{n}\n" for n in range(N_GPUS))  # any devices: nobody opens them
    (folder / "gres.conf").write_text(files)
    environment = os.environ | {"PATH": SYSTEM, "SLURM_CONF": str(folder / "slurm.conf")}
    munged = [
        "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key",
        f"--pid-file={folder}/run/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/run/seed",
    ]  # fmt: skip
    started = list[subprocess.Popen[bytes]]()
    try:
        for words in (munged, ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]):
            with (folder / f"{words[0]}.out").open("w") as log:
                started.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log))
            if words is munged:
                until(lambda: (folder / "munge.socket").exists(), what="munged listens", seconds=20)
        made = Slurm(folder, environment)
        until(lambda: _is_idle(made), what=f"{host} takes jobs", seconds=60)
        yield made
        made.told("scancel", f"--user={getpass.getuser()}")
        until(lambda: not made.jobs(), what="all jobs end", seconds=60)
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _is_idle(made: Slurm) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "--format=%T"], env=made.environment, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() == "idle"
