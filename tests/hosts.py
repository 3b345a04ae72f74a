"""Hosts that are none: network namespaces of this machine, each with a name and an address of its own, on one switch.

    host 1  10.77.0.1 ─ eth0 ══ port1 ┐
    host 2  10.77.0.2 ─ eth0 ══ port2 ┴ switch        all inside of namespaces: this machine's own network sees nothing

Links can be cut, mended and slowed down. Needs root and iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux"}
# How often TCP sends again before it takes a connection for lost: by default for a quarter of an hour, here for 6 s.
RETRIES = 4
# Where `ip netns exec` looks for files that take the place of those in /etc.
ETC = Path("/etc/netns")


def missing() -> str:
    """Why there can be no such hosts here; empty if there can."""
    absent = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
    if absent:
        return f"{' and '.join(absent)} not installed"
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    name = f"kfac{os.getpid()}trial"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    _ip("netns", "delete", name)
    return ""


class Hosts:
    """A switch and some hosts on it; leaving the context takes them away, with what still runs on them.

    Args:
        count: Number of hosts; they are named 1, 2, …
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._prefix = f"kfac{os.getpid()}x"
        self._switch = f"{self._prefix}s"
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        try:
            _ip("netns", "add", self._switch)
            _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "switch", "up")
            for host in range(1, self.count + 1):
                self._plug_in(host)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def name(self, host: int) -> str:
        """The name by which hosts know each other."""
        return f"{self._prefix}{host}"

    def start(
        self, host: int, command: Sequence[str], environment: Mapping[str, str], output: IO[str] | int | None = None
    ) -> subprocess.Popen[str]:
        """Start a program on a host, in a process group of its own; `output` takes both of its streams."""
        name = self.name(host)
        program = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name]
        process = subprocess.Popen(
            [*program, *command],
            env=dict(environment),
            stdout=output,
            stderr=subprocess.STDOUT if output is not None else None,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def cut(self, host: int) -> None:
        """Pull a host's cable; its own interface stays up, as with a dead switch port."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "nomaster")

    def mend(self, host: int) -> None:
        """Plug the cable in again."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "master", "switch")

    def limit(self, rate: str) -> None:
        """Limit what every host sends to a rate in `tc`'s words, such as 100mbit."""
        for host in range(1, self.count + 1):
            _run(
                "ip", "netns", "exec", self.name(host), "tc", "qdisc", "replace", "dev", "eth0", "root", "tbf",
                "rate", rate, "burst", "128kb", "latency", "400ms",
            )  # fmt: skip

    def _plug_in(self, host: int) -> None:
        name, port = self.name(host), f"port{host}"
        _ip("netns", "add", name)
        _ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", port, "netns", self._switch)
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "address", "add", f"10.77.0.{host}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _run("ip", "netns", "exec", name, "sh", "-c", f"echo {RETRIES} > /proc/sys/net/ipv4/tcp_retries2")
        _ip("-n", self._switch, "link", "set", port, "master", "switch", "up")
        known = [f"10.77.0.{other} {self.name(other)}" for other in range(1, self.count + 1)]
        (ETC / name).mkdir(parents=True)
        (ETC / name / "hosts").write_text("\n".join(["127.0.0.1 localhost", *known, ""]))

    def _remove(self) -> None:
        for process in self._started:
            if process.poll() is None:
                os.killpg(process.pid, 9)
            process.wait()
        for name in [self._switch, *(self.name(host) for host in range(1, self.count + 1))]:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
            shutil.rmtree(ETC / name, ignore_errors=True)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)}: {ended.stderr.strip()}")
