"""A real Slurm on this machine: Debian's packages, one controller, two nodes, no systemd and no cgroups.

The nodes are two slurmd on this host, called by two names that it answers to. Jobs of the partition ``urgent`` preempt
those of ``all``, which are warned a minute before and go back to the queue.
"""

import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

CONF = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={port}
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=5
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeHostname={host} Port={port_1} CPUs=4 RealMemory={memory} State=UNKNOWN
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 Port={port_2} CPUs=4 RealMemory={memory} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=10 PreemptMode=OFF
"""


class CannotRunSlurm(Exception):
    """Why there is no Slurm here, for the skip message."""


def install() -> None:
    """Slurm and munge from Debian's packages.

    Raises:
        CannotRunSlurm: not root, no apt, or the packages cannot be had.
    """
    if os.geteuid() != 0:
        raise CannotRunSlurm("Slurm's daemons want root here")
    if shutil.which("slurmctld") and shutil.which("munged"):
        return
    if shutil.which("apt-get") is None:
        raise CannotRunSlurm("Slurm is installed from Debian's packages, and there is no apt-get")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "slurm-wlm", "munge"]):
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        if ended.returncode:
            raise CannotRunSlurm(f"{' '.join(command)}: {ended.stderr.strip().splitlines()[-1:]}")


class SlurmCluster:
    """Started daemons in ``folder``; ``environment`` is what Slurm's commands need."""

    def __init__(self, folder: Path):
        self.folder, self.host = folder, socket.gethostname().split(".")[0]
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        self._nodes = (self.host, "localhost")
        self._munge: subprocess.Popen | None = None

    def __enter__(self) -> "SlurmCluster":
        for name in ("state", *(f"spool-{node}" for node in self._nodes)):
            (self.folder / name).mkdir(parents=True)
        memory = int(re.search(r"RealMemory=(\d+)", self._output("slurmd", "-C")).group(1)) // len(self._nodes)
        (self.folder / "slurm.conf").write_text(
            CONF.format(
                host=self.host,
                folder=self.folder,
                memory=memory,
                port=_free_port(),
                port_1=_free_port(),
                port_2=_free_port(),
            )
        )
        self._start_munge()
        subprocess.run(["slurmctld"], env=self.environment, check=True)
        try:
            for node in self._nodes:
                subprocess.run(["slurmd", "-N", node], env=self.environment, check=True)
            self.wait(
                lambda: self._output("sinfo", "-h", "-N", "-p", "all", "-o", "%T").split() == ["idle"] * 2,
                60,
                "the nodes are not idle",
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["scancel", "--state=RUNNING,PENDING", "--me"], env=self.environment, capture_output=True)
        for name in (*(f"slurmd-{node}" for node in self._nodes), "slurmctld"):
            _stop(self.folder / f"{name}.pid")
        if self._munge is not None:
            self._munge.terminate()
            self._munge.wait(timeout=10)

    def submit(self, *arguments: str) -> int:
        """Job id of ``sbatch ARGUMENT …``, submitted from the folder that holds the job's files."""
        return int(self._output("sbatch", "--parsable", *arguments).split(";")[0])

    def state(self, job: int) -> str:
        """Slurm's word for the job's state."""
        return re.search(r"JobState=(\S+)", self.show(job)).group(1)

    def show(self, job: int) -> str:
        """``scontrol show job``."""
        return self._output("scontrol", "show", "job", str(job))

    def command(self, *arguments: str) -> None:
        """Run one of Slurm's commands."""
        self._output(*arguments)

    def start_now(self, job: int) -> None:
        """A requeued job waits two minutes by default; until it has ended everywhere Slurm does not change it."""

        def changed() -> bool:
            command = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
            return subprocess.run(command, env=self.environment, capture_output=True).returncode == 0

        self.wait(changed, 90, "the requeued job cannot be started")

    def wait(self, condition, seconds: float, what: str) -> None:
        """Until ``condition()``; AssertionError with the daemons' last lines after ``seconds``."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-2000:] for path in self.folder.glob("slurm*.log"))
                raise AssertionError(f"{what} after {seconds} s\n{logs}")
            time.sleep(0.5)

    def _output(self, *command: str) -> str:
        ended = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, cwd=self.folder.parent, timeout=60
        )
        if ended.returncode:
            raise AssertionError(f"{' '.join(command)}: {ended.stderr}")
        return ended.stdout

    def _start_munge(self) -> None:
        if subprocess.run(["munge", "-n"], capture_output=True).returncode == 0:
            return
        for folder in ("/run/munge", "/var/log/munge", "/var/lib/munge"):
            Path(folder).mkdir(exist_ok=True)
            shutil.chown(folder, "munge", "munge")
        self._munge = subprocess.Popen(
            ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged", "--foreground"],
            stderr=subprocess.DEVNULL,
        )
        self.wait(lambda: subprocess.run(["munge", "-n"], capture_output=True).returncode == 0, 20, "no munge")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _stop(pid_file: Path) -> None:
    if not pid_file.exists():
        return
    pid = int(pid_file.read_text())
    os.kill(pid, 15)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.1)
    os.kill(pid, 9)
