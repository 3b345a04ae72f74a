"""Processes of the command line that skip Python's start: `Started(["train", "run.yaml"])` for `python -m kfac_dist`.

Importing torch takes a process seconds; these are forked from the server of `tests.harness`, which has it. Each is a
process of its own, with its signals, its exit code and what it prints, and joins other ranks over the network as any.
What a launcher or an interpreter does at its start is tested with the real thing.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.harness import fork, leave_undrawn


class Started:
    """`kfac-dist WORDS` in a process of its own; the methods are those of `subprocess.Popen`.

    Args:
        words: Of the command line.
        environment: All of its variables.
        new_session: Whether it leads a session, to be signalled with its children.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], *, new_session: bool = False) -> None:
        file, name = tempfile.mkstemp(prefix="said-")
        os.close(file)
        self._said = Path(name)
        self._process = fork(_main, list(words), dict(environment), name, new_session)
        assert self._process.pid is not None
        self.pid = self._process.pid

    def __del__(self) -> None:
        self._said.unlink(missing_ok=True)

    @property
    def returncode(self) -> int | None:
        """Its exit code, minus the number of the signal that killed it, or None while it runs."""
        return self._process.exitcode

    poll = returncode.fget

    @property
    def said(self) -> str:
        """Everything that it has printed and warned of so far."""
        return self._said.read_text()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("kfac-dist", timeout or 0.0, self.said)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self.said, None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _main(words: list[str], environment: dict[str, str], said: str, new_session: bool) -> None:
    if new_session:
        os.setsid()
    file = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    if "COVERAGE_PROCESS_CONFIG" not in environment:
        _stop_measuring()
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["kfac-dist", *words]
    import torch

    import kfac_dist.training.run  # noqa: F401
    from kfac_dist.cli import main

    leave_undrawn()
    torch.set_num_threads(1)
    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()


def _stop_measuring() -> None:
    coverage = sys.modules.get("coverage")
    measuring = None if coverage is None else coverage.Coverage.current()
    if measuring is not None:
        measuring.stop()
