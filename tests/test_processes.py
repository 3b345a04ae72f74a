"""A process is known by its number and the moment of its start."""

from __future__ import annotations

import os
import subprocess
import sys

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
