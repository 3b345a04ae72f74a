"""A run's directory is one process's, until that is dead."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from kfac_dist.errors import ConfigError, KFACError
from kfac_dist.reporting import run_lock
from kfac_dist.reporting.run_lock import Holder, RunInUseError, RunLock, living_holder, lock_path, this_process

IMPATIENT = {"patience_seconds": 0.0}


def _held(directory: Path, holder: Holder, age: float = 0.0) -> Path:
    path = lock_path(directory)
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def _files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@contextmanager
def _other_process() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _held_by(pid: int) -> Holder:
    return replace(this_process(), pid=pid, started=run_lock.process(pid).started, token="theirs")


def test_a_directory_is_taken_once_and_given_up(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    with RunLock(run):
        assert _files(run.parent) == ["a.lock"], "nothing else stays, and the directory itself is not touched"
        holder = living_holder(run)
        assert holder is not None
        assert holder.pid == os.getpid()
        with pytest.raises(RunInUseError) as refused, RunLock(run, **IMPATIENT):
            pass
        assert str(refused.value) == (
            f"{run} is in use by process {os.getpid()} on {holder.host}, since "
            f"{time.strftime('%F %T', time.localtime(holder.since))}: wait for it or end it, or give another --name"
        )
        assert _files(run.parent) == ["a.lock"]
    assert _files(run.parent) == []
    assert living_holder(run) is None


def test_of_many_that_start_at_once_one_begins(tmp_path: Path) -> None:
    dead = replace(this_process(), started="1", token="dead")
    for begin in (lambda run: None, lambda run: _held(run, dead)):
        run = tmp_path / "a"
        begin(run)
        gate, held = threading.Barrier(8), threading.Event()

        def start(run: Path = run, gate: threading.Barrier = gate, held: threading.Event = held) -> bool:
            gate.wait()
            try:
                with RunLock(run, patience_seconds=0.5):
                    held.wait(20)
                    return True
            except RunInUseError:
                return False

        with ThreadPoolExecutor(8) as pool:
            starts = [pool.submit(start) for _ in range(8)]
            deadline = time.monotonic() + 20
            while sum(done.done() for done in starts) < 7 and time.monotonic() < deadline:
                time.sleep(0.01)
            held.set()
            assert sorted(done.result() for done in starts) == [False] * 7 + [True]
        assert _files(tmp_path) == []


def test_no_two_have_it_however_many_are_killed(tmp_path: Path) -> None:
    fight = [sys.executable, str(Path(__file__).with_name("lock_fight.py")), str(tmp_path / "a")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(fight, env=environment, capture_output=True, text=True, check=True, timeout=100)

    taken, at_once, killed, _ = map(int, ended.stdout.split())
    assert taken > 200
    assert killed >= 40
    assert at_once == 0
    # What the killed have left goes with the next start that finds it old.
    for path in tmp_path.iterdir():
        os.utime(path, (time.time() - 1000,) * 2)
    with RunLock(tmp_path / "a"):
        assert _files(tmp_path) == ["a.lock", "held"]


def test_a_holder_on_this_host_lives_as_long_as_its_process(tmp_path: Path) -> None:
    run, said = tmp_path / "a", list[str]()
    with _other_process() as process:
        holder = _held_by(process.pid)
        _held(run, holder, age=10_000)  # stopped for hours, and still there
        with pytest.raises(RunInUseError, match=f"process {process.pid} on "), RunLock(run, **IMPATIENT):
            pass
        process.kill()  # nobody waits for it: it stays as a zombie
        with RunLock(run, note=said.append):
            assert [line for line in said if "that process is gone" in line and str(process.pid) in line]
            held = living_holder(run)
            assert held is not None
            assert held.pid == os.getpid()


def test_a_holder_that_ends_just_now_is_waited_for(tmp_path: Path) -> None:
    with _other_process() as process:
        _held(tmp_path / "a", _held_by(process.pid))
        threading.Timer(0.3, process.kill).start()
        with RunLock(tmp_path / "a", patience_seconds=10):
            pass


def test_the_number_of_a_dead_holder_may_be_another_process(tmp_path: Path) -> None:
    _held(tmp_path / "a", replace(this_process(), started="1", token="dead"))
    with RunLock(tmp_path / "a", **IMPATIENT):
        pass


@pytest.mark.parametrize("elsewhere", [{"host": "node7"}, {"marks": "another boot, or another container"}])
def test_a_holder_elsewhere_lives_as_long_as_its_heart_beats(tmp_path: Path, elsewhere: dict[str, str]) -> None:
    run = tmp_path / "a"
    # A process number that says nothing here.
    holder = replace(this_process(), pid=2**30, slurm_job="41", token="theirs", **elsewhere)
    _held(run, holder, age=run_lock.STALE_SECONDS - 60)
    with pytest.raises(RunInUseError, match=rf"process {2**30} on {holder.host}, SLURM job 41, .* in (59|60) s it is"):
        RunLock(run, **IMPATIENT).__enter__()
    _held(run, holder, age=run_lock.STALE_SECONDS + 1)
    with RunLock(run, **IMPATIENT):
        pass


def test_a_job_that_was_started_again_takes_over_from_itself(tmp_path: Path) -> None:
    run = tmp_path / "a"
    holder = replace(this_process("slurm 7"), host="node7", token="theirs")
    _held(run, holder)
    for job, restarted in (("slurm 8", True), ("", True)):
        with pytest.raises(RunInUseError):
            RunLock(run, job, restarted=restarted, **IMPATIENT).__enter__()
    with RunLock(run, "slurm 7", restarted=True, **IMPATIENT):
        pass
    with _other_process() as process:
        _held(run, replace(_held_by(process.pid), job="slurm 7"))
        with pytest.raises(RunInUseError):  # two steps of one job
            RunLock(run, "slurm 7", restarted=True, **IMPATIENT).__enter__()


def test_a_start_of_the_same_job_waits_for_one_that_ends_on_another_host(tmp_path: Path) -> None:
    run = tmp_path / "a"
    _held(run, replace(this_process("torchrun 7"), host="node7", token="theirs"))
    with RunLock(run, "torchrun 7", stale_seconds=0.5, **IMPATIENT):
        pass


def test_a_heart_beats_and_one_that_lost_its_directory_says_so(tmp_path: Path) -> None:
    run = tmp_path / "a"
    lock = RunLock(run, beat_seconds=0.05)
    with lock:
        os.utime(lock_path(run), (0, 0))
        deadline = time.monotonic() + 10
        while lock_path(run).stat().st_mtime < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - lock_path(run).stat().st_mtime < 5
        assert lock.failure is None
        _held(run, replace(this_process(), host="node7", pid=5, token="theirs"))
        while lock.failure is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert isinstance(lock.failure, KFACError)
        assert "taken over by process 5 on node7" in str(lock.failure)
    assert lock_path(run).exists(), "another's lock is not ours to remove"


def test_without_links_a_file_that_must_be_new_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with RunLock(tmp_path / "a"):
        with pytest.raises(RunInUseError):
            RunLock(tmp_path / "a", **IMPATIENT).__enter__()
        assert _files(tmp_path) == ["a.lock"]
    assert _files(tmp_path) == []


def test_a_lock_that_can_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_PAUSE_SECONDS", 0.0)
    lock_path(tmp_path / "a").write_text("{")
    with pytest.raises(KFACError, match=r"a\.lock: can't be read"):
        RunLock(tmp_path / "a").__enter__()


@pytest.mark.parametrize("kind", ["directory", "pipe", "lost link", "device", "deep"])
def test_what_is_no_lock_is_named_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(run_lock, "_PAUSE_SECONDS", 0.001)
    path = lock_path(tmp_path / "a")
    {
        "directory": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "lost link": lambda: path.symlink_to(tmp_path / "nowhere"),
        "device": lambda: path.symlink_to("/dev/zero"),
        "deep": lambda: path.write_text("[" * 200_000),
    }[kind]()
    said = {
        "lost link": "is a link, expected",
        "device": "is a link, expected",
        "deep": "can't be read: maximum recursion",
    }
    expected = re.escape(f"{path}: {said.get(kind, 'is no regular file, expected')}")
    for ask in (RunLock(tmp_path / "a").__enter__, lambda: living_holder(tmp_path / "a")):
        with pytest.raises(ConfigError, match=f"^{expected}"):
            ask()
    assert _files(tmp_path) == ["a.lock"]


def test_a_takeover_that_died_in_the_midst_does_not_last(tmp_path: Path) -> None:
    run = tmp_path / "a"
    _held(run, replace(this_process(), started="1", token="dead"))
    turn = lock_path(run).with_name("a.lock.takeover")
    turn.touch()
    with pytest.raises(RunInUseError):
        RunLock(run, **IMPATIENT).__enter__()
    os.utime(turn, (0, 0))
    with RunLock(run, patience_seconds=5):
        pass
    assert _files(tmp_path) == []
