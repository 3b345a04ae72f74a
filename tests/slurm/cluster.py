"""A SLURM cluster of this host's own: munged, slurmctld and a few slurmd in one directory, on free ports.

    with Cluster(nodes=2) as cluster:
        job = cluster.submit("--nodes", "2", "script.sbatch")

All nodes are this host by other names. The daemons run in the foreground as children of the test process, which ends
them by their pids, after the jobs.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

DAEMONS = ("munged", "slurmctld", "slurmd")
START_SECONDS = 30.0

_CONF = """\
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until the credentials of its earlier start have expired: seconds instead of two minutes.
AuthInfo=socket={directory}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
KillWait=20
ReturnToService=2
JobRequeue=1
"""


def missing() -> str:
    """Why there can be no cluster here; empty if there can."""
    absent = [name for name in (*DAEMONS, "sbatch", "srun") if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: slurmctld, slurmd, slurm-client, munge)"
    return "" if os.geteuid() == 0 else "slurmd starts jobs as root only"


class Cluster:
    """A running cluster; leaving the context ends its jobs and daemons.

    Attributes:
        directory: Configuration, keys, state and logs.
        environment: What SLURM's commands and a job's script need to find it.
    """

    def __init__(self, nodes: int) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.directory.chmod(0o755)
        self.nodes = nodes
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "SLURM_CONF": str(self.directory / "slurm.conf"),
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self._configure()
            key, munge = self.directory / "munge.key", self.directory / "munge"
            key.write_bytes(secrets.token_bytes(1024))
            key.chmod(0o400)
            self._start(
                "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.directory}/munge.socket",
                f"--pid-file={munge}.pid", f"--seed-file={munge}.seed", f"--log-file={munge}.log",
            )  # fmt: skip
            self._wait("munged's socket", lambda: (self.directory / "munge.socket").exists())
            self._start("slurmctld", "-D")
            for node in self._names():
                self._start("slurmd", "-D", "-N", node)
            self._wait(
                "idle nodes", lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == f"{self.nodes}"
            )
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        shutil.rmtree(self.directory)

    def run(self, *command: str, **environment: str) -> str:
        """Run one of SLURM's commands; returns what it prints."""
        ended = subprocess.run(
            command, env={**self.environment, **environment}, capture_output=True, text=True, timeout=60, check=False
        )
        assert ended.returncode == 0, f"{' '.join(command)}: {ended.stderr}"
        return ended.stdout

    def state(self, job: str) -> str:
        """A job's state, such as RUNNING; empty once SLURM has forgotten it."""
        told = self.run("scontrol", "show", "job", job, "--oneliner")
        return next((part.removeprefix("JobState=") for part in told.split() if part.startswith("JobState=")), "")

    def alive(self, job: str) -> bool:
        """Whether a job waits, runs or has ended well."""
        return self.state(job) not in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

    def _names(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.nodes + 1)]

    def _configure(self) -> None:
        controller, *ports = _free_ports(1 + self.nodes)
        lines = [_CONF.format(directory=self.directory, controller_port=controller)]
        host = socket.gethostname().split(".")[0]
        for node, port in zip(self._names(), ports, strict=True):
            (self.directory / f"spool-{node}").mkdir()
            # More processors than there are: jobs of a test wait for each other less.
            lines.append(f"NodeName={node} NodeAddr=127.0.0.1 NodeHostname={host} Port={port} CPUs=4\n")
        lines.append(f"PartitionName=test Nodes={','.join(self._names())} Default=YES MaxTime=60 State=UP\n")
        (self.directory / "state").mkdir()
        (self.directory / "slurm.conf").write_text("".join(lines))

    def _start(self, daemon: str, *arguments: str) -> None:
        program = shutil.which(daemon)
        assert program is not None
        with (self.directory / f"{daemon}-{len(self._daemons)}.out").open("wb") as out:
            self._daemons.append(
                subprocess.Popen(
                    [program, *arguments], env=self.environment, stdout=out, stderr=out, cwd=self.directory
                )
            )

    def _wait(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                if condition():
                    return
            except AssertionError:  # the controller does not answer yet
                pass
            if time.monotonic() > deadline:
                said = "\n".join(path.read_text(errors="replace")[-2000:] for path in self.directory.glob("*.out"))
                raise AssertionError(f"no {what} after {START_SECONDS:g} s\n{said}")
            time.sleep(0.1)

    def _stop(self) -> None:
        if len(self._daemons) > 1 and self._daemons[1].poll() is None:
            subprocess.run(["scancel", "--full", "--signal=KILL", "--user=root"], env=self.environment, check=False)
            subprocess.run(["scancel", "--user=root"], env=self.environment, check=False)
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline and self.run("squeue", "-h").strip():
                time.sleep(0.1)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports: list[int] = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
