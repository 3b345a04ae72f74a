"""A process is known by its number and the moment of its start."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from kfac_dist.processes import Process, parent_of, place, process, variables_of


def test_a_process_is_alive_until_it_ends_also_if_nobody_waits_for_it() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, env={"MARK": "1"})
    found = process(child.pid)
    assert found.alive
    assert parent_of(child.pid) == os.getpid()
    assert not Process(found.pid, "1").alive, "another process had its number before"
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not found.alive, "it has ended, though its parent has not asked how"
    child.wait()
    assert not found.alive
    assert variables_of(child.pid) is None


def test_a_process_is_alive_as_long_as_one_of_its_threads() -> None:
    program = (
        "import ctypes, sys, threading\n"
        "threading.Thread(target=sys.stdin.read).start()\n"
        "print(flush=True)\n"
        "ctypes.CDLL(None).pthread_exit(None)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        found, stat = process(child.pid), Path(f"/proc/{child.pid}/stat")
        deadline = time.monotonic() + 10
        while " Z " not in stat.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert found.alive
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not found.alive


def test_variables_are_those_that_it_was_started_with() -> None:
    program = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"MARK": "a=b"}
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert variables_of(child.pid) == {"MARK"}
        child.kill()


def test_this_place_has_a_name_and_marks() -> None:
    host, marks = place()
    assert host
    assert "pid:[" in marks
