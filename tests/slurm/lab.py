"""A real Slurm on this machine: munged, slurmctld and some slurmd on loopback, one for each test session.

Several facts of Slurm shaped it. Credentials must expire after 5 s, because a requeued job otherwise waits
for two minutes. GPUs are counted only if they have device files. Ranks survive a killed slurmd. `sbatch -W`
polls rarely, so the tests poll themselves.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
# Debian installs daemons in directories that are not in a user's PATH.
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
_COMMON = """
ClusterName=lab
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={base}/munge.sock,cred_expire=5
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd-%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
TopologyPlugin=topology/tree
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SwitchType=switch/none
MpiDefault=none
GresTypes=gpu
ReturnToService=1
JobRequeue=1
SlurmdTimeout=10
SlurmctldTimeout=10
InactiveLimit=0
KillWait=5
MinJobAge=600
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
"""
# Jobs of `urgent` preempt jobs of `spot`, which have a grace time.
_PARTITIONS = """
PartitionName=lab Nodes=ALL Default=YES MaxTime=7-00:00:00 PriorityTier=5 PreemptMode=OFF State=UP
PartitionName=spot Nodes=ALL MaxTime=7-00:00:00 PriorityTier=1 PreemptMode=REQUEUE GraceTime=10 State=UP
PartitionName=urgent Nodes=ALL MaxTime=7-00:00:00 PriorityTier=9 PreemptMode=OFF State=UP
"""
_H100 = (
    "NodeAddr=127.0.0.1 CPUs=192 Boards=1 SocketsPerBoard=2 CoresPerSocket=96 ThreadsPerCore=1 "
    "RealMemory=2000000 Gres=gpu:h100:8 State=CLOUD"
)


def installed() -> bool:
    """Whether Slurm's daemons are installed on this machine."""
    return all(shutil.which(name, path=PATH) for name in DAEMONS)


class Lab:
    """A running cluster. `lab("squeue", ...)` runs a command that sees it."""

    def __init__(self) -> None:
        # The path is short because paths of unix sockets have at most 108 bytes.
        self.base = Path(tempfile.mkdtemp(prefix="lab-", dir="/tmp"))
        self.conf = self.base / "slurm.conf"
        self.env = {**os.environ, "SLURM_CONF": str(self.conf), "PATH": PATH}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("state", "spool", "dev"):
            (self.base / name).mkdir()
        self.base.chmod(0o755)

    def start_nodes(self, count: int) -> None:
        """Start munged, slurmctld and `count` slurmd of 8 CPUs without GPUs, and wait until all are idle."""
        port = _free_ports(count + 1)
        names = [f"n{i}" for i in range(1, count + 1)]
        nodes = [
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port + i} CPUs=8 Sockets=1 "
            "CoresPerSocket=8 ThreadsPerCore=1 RealMemory=20000 State=UNKNOWN"
            for i, name in enumerate(names, start=1)
        ]
        for name in names:
            (self.base / "spool" / name).mkdir()
        self._start_controller(port, nodes, [f"SwitchName=leaf Nodes=n[1-{count}]"])
        for name in names:
            self._daemon(name, ["slurmd", "-D", "-f", str(self.conf), "-N", name])
        wait_until(lambda: self("sinfo", "-h", "-N", "-p", "lab", "-o", "%T").split() == ["idle"] * count, 40)

    def start_plan(self, count: int) -> None:
        """Start slurmctld only. Its `count` nodes of 8 H100s need not exist for `sbatch --test-only`."""
        for index in range(8):
            (self.base / "dev" / f"nvidia{index}").touch()
        gres = f"AutoDetect=off\nName=gpu Type=h100 File={self.base}/dev/nvidia[0-7]\n"
        (self.base / "gres.conf").write_text(gres)
        leaves = [
            f"SwitchName=leaf{i // 32} Nodes=h100-[{i + 1:04d}-{min(count, i + 32):04d}]"
            for i in range(0, count, 32)
        ]
        spine = f"SwitchName=spine Switches=leaf[0-{len(leaves) - 1}]"
        power = "SuspendProgram=/bin/true\nResumeProgram=/bin/true\nSuspendTime=-1\nResumeTimeout=600"
        port = _free_ports(2)
        nodes = [f"NodeName=h100-[0001-{count:04d}] Port={port + 1} {_H100}", power]
        self._start_controller(port, nodes, [*leaves, spine])

    def __call__(self, *command: str, check: bool = True, **env: str) -> str:
        """Output of a command, stdout first.

        Raises `AssertionError` if `check` is set and the command fails.
        """
        done = subprocess.run(
            command, env={**self.env, **env}, capture_output=True, text=True, timeout=60, cwd=self.base
        )
        message = f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}"
        assert not check or done.returncode == 0, message
        return (done.stdout + done.stderr).strip()

    def state(self, job: int | str) -> str:
        return self("squeue", "-h", "--states=all", "-j", str(job), "-o", "%T")

    def restarts(self, job: int | str) -> int:
        return int(self("squeue", "-h", "--states=all", "-j", str(job), "-O", "RestartCnt"))

    def wait(self, job: int | str, *states: str, timeout: float = 120) -> str:
        """Poll until a job is in one of the states."""
        wait_until(lambda: self.state(job) in states, timeout, lambda: f"job {job} is {self.state(job)}")
        return self.state(job)

    def restarted(self, job: int, times: int, explain: Callable[[], str]) -> None:
        """Wait until a job has been requeued for the `times`-th time.

        Slurm then holds the job back for 6 s. A StartTime of now would avoid the delay, but the job may then
        start while its own credential is being revoked.
        """
        wait_until(lambda: self.restarts(job) >= times, 90, explain)
        assert self.restarts(job) == times

    def kill_node(self, name: str) -> None:
        """Kill slurmd, its step daemons and all ranks of a node at once, as a power failure does."""
        victims = [self._daemons[name].pid]
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURMD_NODENAME") == name:
                    victims.append(process.pid)
                    victims += [p.pid for p in process.parents() if p.name().startswith("slurmstepd")]
        for pid in dict.fromkeys(victims):
            with contextlib.suppress(psutil.Error):
                psutil.Process(pid).kill()
        self._daemons[name].wait(10)

    def freeze(self, job: int) -> list[psutil.Process]:
        """Stop the ranks of a job, but neither srun nor its script. Returns the stopped processes."""
        ranks = []
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                environ = process.environ()
                if environ["SLURM_JOB_ID"] == str(job) and "SLURM_STEP_NUM_TASKS" in environ:
                    process.suspend()
                    ranks.append(process)
        return ranks

    def stop(self) -> None:
        """Stop all processes that were started, and the processes that those started."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self("scancel", "--me", check=False)
            wait_until(lambda: not self("squeue", "-h"), 15)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(self.base, ignore_errors=True)

    def _processes(self) -> Iterator[psutil.Process]:
        """All processes that this cluster has started, without this test."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environ = process.environ()
                is_job = "SLURM_JOB_ID" in environ or process.name().startswith("slurmstepd")
                if is_job and environ.get("SLURM_CONF") == str(self.conf):
                    yield process

    def _start_controller(self, port: int, nodes: list[str], topology: list[str]) -> None:
        common = _COMMON.format(base=self.base, port=port, user=psutil.Process().username())
        self.conf.write_text(common + "\n".join(nodes) + _PARTITIONS)
        (self.base / "topology.conf").write_text("\n".join(topology) + "\n")
        (self.base / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key = self.base / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(64))
        files = {"socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.base}/munge.{suffix}" for option, suffix in files.items()]
        self._daemon("munged", ["munged", "-F", "--force", "--num-threads=2", f"--key-file={key}", *options])
        wait_until((self.base / "munge.sock").exists, 10)
        self._daemon("slurmctld", ["slurmctld", "-D", "-i", "-f", str(self.conf)])
        wait_until(lambda: "UP" in self("scontrol", "ping", check=False), 20)

    def _daemon(self, name: str, command: list[str]) -> None:
        with (self.base / f"{name}.out").open("wb") as out:
            self._daemons[name] = subprocess.Popen(
                command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )


def wait_until(
    is_true: Callable[[], bool], timeout: float, explain: Callable[[], str] = lambda: "it did not happen"
) -> None:
    """Poll five times a second. Raises `AssertionError` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not is_true():
        assert time.monotonic() < deadline, f"after {timeout:.0f} s: {explain()}"
        time.sleep(0.2)


def _free_ports(count: int) -> int:
    """The first of `count` consecutive free loopback ports below the ephemeral ports."""
    for first in range(23000, 31000, 64):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + count):
                listener = stack.enter_context(socket.socket())
                listener.bind(("127.0.0.1", port))
            return first
    raise AssertionError("no free ports")
