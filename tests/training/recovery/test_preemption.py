"""A scheduler tells one rank to stop: all of them save and leave, and what goes on later is the same run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from kfac_dist.config.schema import Config
from kfac_dist.config.yaml.load import dump_yaml
from kfac_dist.distributed.communicators.base import SoloCommunicator
from kfac_dist.distributed.communicators.build import build_communicator
from kfac_dist.reporting.run_file import State, read_record
from kfac_dist.tasks import DataSplits
from kfac_dist.training import train
from kfac_dist.training.recovery.preemption import POLL_SECONDS, SAME_SECONDS, Preemption, StopSignals
from tests.harness import run_ranks
from tests.training.runs import DropoutNet, final_model, launched, losses, random_pixels, small_config

STEPS = 160


class SignalledNet(DropoutNet):
    """Gets a signal in the midst of a forward pass, on one rank."""

    def __init__(self, rank: int = -1, passes: int = 0, number: int = 0) -> None:
        super().__init__()
        self.left = passes if os.environ.get("RANK", "0") == str(rank) else 0
        self.number = number

    def forward(self, pixels: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        outputs: Tensor = super().forward(pixels)
        return outputs


class SlowPixels(Dataset[Any]):
    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        time.sleep(float(os.environ.get("SECONDS_PER_SAMPLE", "0")))
        while os.path.exists(os.environ.get("STANDSTILL", "")):
            time.sleep(0.1)
        return self.pixels[index], self.pixels[index]


def slow_pixels() -> DataSplits:
    splits = random_pixels()
    train, test = (torch.stack([pixels for pixels, _ in part]) for part in (splits.train, splits.test))
    return DataSplits(SlowPixels(train), SlowPixels(test))


def _run(directory: str, resume: str = "auto", **model: int) -> Config:
    name = "tests.training.recovery.test_preemption:SignalledNet"
    return small_config(
        directory,
        kfac=True,
        model={"name": name, "args": model},
        # Most stops are in the midst of a window; no rank has a batch of one, which BatchNorm refuses.
        train={"steps": STEPS, "log_every": 7, "batch_size": 13},
        checkpoint={"every": 50, "resume": resume},
    )


def _stopped_twice(directory: str) -> dict[str, Any]:
    """Runs on every rank: the whole run, and one that is told to stop by two ranks and two signals."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    os.environ.update(launched(rank, world_size))
    train(_run(f"{directory}/whole", "never"), quiet=True)
    ours = signal.getsignal(signal.SIGTERM)
    stops, states = [], []
    for who, passes, number in ((world_size - 1, 40, signal.SIGUSR1), (0, 60, signal.SIGTERM)):
        result = train(_run(f"{directory}/stopped", rank=who, passes=passes, number=number), quiet=True)
        stops.append(result.preempted_at)
        states.append(read_record(Path(directory) / "stopped/small"))
    complete = train(_run(f"{directory}/stopped"), quiet=True)
    return {
        "stops": stops,
        "states": [(record.state, record.reason, record.step) for record in states if record],
        "complete": complete.preempted_at,
        "handler_is_back": signal.getsignal(signal.SIGTERM) == ours,
    }


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_signal_on_one_rank_stops_all_and_the_run_continues_bit_for_bit(tmp_path: Path, world_size: int) -> None:
    told = run_ranks(world_size, _stopped_twice, str(tmp_path))
    first, second = stops = told[0]["stops"]
    assert 30 < first < second < STEPS
    assert [rank["stops"] for rank in told] == [stops] * world_size, "no rank acts alone"
    assert told[0]["states"] == [
        (State.PREEMPTED, f"SIGUSR1 on rank {world_size - 1}", first),
        (State.PREEMPTED, "SIGTERM on rank 0", second),
    ]
    assert [rank["complete"] for rank in told] == [None] * world_size
    assert all(rank["handler_is_back"] for rank in told)
    record = read_record(tmp_path / "stopped/small")
    assert record is not None
    assert (record.state, record.step, record.total_steps) == (State.FINISHED, STEPS, STEPS)
    assert losses(tmp_path / "stopped/small") == losses(tmp_path / "whole/small")
    expected = final_model(tmp_path / "whole/small")
    assert all((value == expected[name]).all() for name, value in final_model(tmp_path / "stopped/small").items())


def test_all_processes_of_a_job_are_signalled_and_none_is_lost(tmp_path: Path) -> None:
    """What SLURM does: it signals launchers, ranks and data loaders alike."""
    sections: dict[str, Any] = {
        "data": {"name": "tests.training.recovery.test_preemption:slow_pixels"},
        "train": {"steps": 60, "log_every": 4, "loader_workers": 1},
        "checkpoint": {"every": 0, "resume": "auto"},
    }
    config = tmp_path / "run.yaml"
    config.write_text(dump_yaml(small_config(tmp_path / "stopped", **sections)))
    rank = subprocess.Popen(
        [sys.executable, "-m", "kfac_dist", "train", str(config), "--quiet"],
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "SECONDS_PER_SAMPLE": "0.003"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    directory = tmp_path / "stopped/small"
    deadline = time.monotonic() + 60
    while not losses(directory):
        assert rank.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(rank.pid, signal.SIGTERM)
    told, _ = rank.communicate(timeout=60)
    assert rank.returncode == 0
    record = read_record(directory)
    assert record is not None
    assert told == f"preempted at step {record.step} by SIGTERM on rank 0; --resume auto continues {directory}\n"

    train(small_config(tmp_path / "stopped", **sections), quiet=True)
    train(small_config(tmp_path / "whole", **sections), quiet=True)
    assert losses(directory) == losses(tmp_path / "whole/small")


def test_a_failure_is_written_down(tmp_path: Path) -> None:
    config = small_config(tmp_path, optimizer={"lr": 1e30}, loss={"name": "mse"})
    with pytest.raises(Exception, match="training loss"):
        train(config, quiet=True)
    record = read_record(tmp_path / "small")
    assert record is not None
    assert record.state is State.FAILED
    assert record.reason.startswith("the training loss is")
    assert json.loads((tmp_path / "small/state.json").read_text())["pid"] == os.getpid()


def _poll_steps(seconds_per_step: float, steps: int) -> tuple[list[int], int]:
    """Runs on every rank: the boundaries at which collectives were started, and when a signal was heard."""
    now = 0.0
    communicator = build_communicator(20)
    signals = StopSignals()
    preemption = Preemption(signals, communicator, lambda: now)
    polls, heard = [], 0
    for step in range(steps):
        before = communicator.traffic.calls["preemption"]
        if preemption.due():
            heard = step
            break
        if communicator.traffic.calls["preemption"] > before:
            polls.append(step)
        if step == steps // 2 and communicator.rank == 1:
            signals.caught = "SIGTERM"
        now += seconds_per_step * (1 + communicator.rank)  # clocks differ; what follows from them must not
    communicator.close()
    return polls, heard


def test_polls_are_rare_in_quick_steps_and_all_ranks_plan_the_same() -> None:
    quick = run_ranks(2, _poll_steps, 0.001, 1000)
    assert quick[0] == quick[1]
    polls, heard = quick[0]
    assert 5 <= len(polls) <= 12
    assert 500 < heard <= 500 + POLL_SECONDS / 0.001
    slow = run_ranks(2, _poll_steps, 1.0, 20)
    assert slow[0] == slow[1] == (list(range(12)), 12)


def _grant(steps: int) -> list[list[bool]]:
    communicator = build_communicator(20)
    requests = (lambda: communicator.rank == 1, lambda: False)
    preemption = Preemption(StopSignals(), communicator, requests=requests)
    granted = []
    for _ in range(steps):
        assert not preemption.due()
        granted.append(preemption.granted)
    preemption.finish()
    communicator.close()
    return granted


def test_a_request_of_one_rank_is_granted_on_all() -> None:
    first, second = run_ranks(2, _grant, 4)
    assert first == second
    assert [True, False] in first
    assert first[0] == [False, False]


def _fulfil(steps: int, every: int) -> list[int]:
    """Runs on every rank: the boundaries at which a wish of rank 0's clock was fulfilled, which sets that back."""
    communicator = build_communicator(20)
    step, fulfilled = 0, [0]
    requests = (lambda: communicator.rank == 0 and step - fulfilled[-1] >= every,)
    preemption = Preemption(StopSignals(), communicator, lambda: float(step), requests)
    for step in range(1, steps):
        assert not preemption.due()
        if any(preemption.granted):
            fulfilled.append(step)
    preemption.finish()
    communicator.close()
    return fulfilled


def test_a_wish_is_fulfilled_once() -> None:
    first, second = run_ranks(2, _fulfil, 30, 6)
    assert first == second == [0, 7, 14, 21, 28], "asked for when 6 steps have passed, and granted a step later"


def test_alone_the_next_boundary_stops() -> None:
    with StopSignals() as signals:
        preemption = Preemption(signals, SoloCommunicator())
        assert not preemption.due()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert preemption.due()
        assert signals.caught == "SIGUSR1"


def test_ctrl_c_is_an_exception_only_where_nothing_is_to_be_saved() -> None:
    now = 0.0
    with StopSignals(clock=lambda: now) as signals:
        with signals.deferring():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # the launcher's, after the terminal's
            assert signals.caught == "SIGINT"
            assert signals.interrupted
        now = SAME_SECONDS + 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with StopSignals() as signals, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.caught is None, "it was not for this process"
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_terminal_that_is_gone_stops_a_run_unless_that_was_ignored() -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.caught == "SIGHUP"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.caught is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_leaves_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[Any] = []

    def enter() -> None:
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]
