"""Seconds by phase: each second counts once, on a CPU by the clock and on a GPU by events that nobody waits for."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

import kfac_dist.preconditioner.phases as phases_module
from kfac_dist import KFAC
from kfac_dist.preconditioner.phases import Phase, PhaseTimer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: events are CUDA's")


def _stepped(device: str, *, enabled: bool, steps: int = 4) -> tuple[KFAC, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {"curvature": {"factor_every": 1}, "inversion": {"inverse_every": 2}}
    kfac = KFAC(model, config, optimizer=optimizer)
    kfac.monitor.phases.enabled = enabled
    for step in range(steps):
        inputs = torch.randn(8, 20, generator=torch.Generator().manual_seed(step)).to(device)
        loss = nn.functional.cross_entropy(model(inputs), torch.arange(8, device=device) % 5)
        optimizer.zero_grad()
        loss.backward()
        kfac.step()
        optimizer.step()
    return kfac, model


def test_a_phase_interrupts_the_one_around_it() -> None:
    timer = PhaseTimer(torch.device("cpu"))
    timer.enabled = True
    with timer(Phase.REDUCTION):
        time.sleep(0.02)
        with timer(Phase.STATISTICS):
            time.sleep(0.2)
        time.sleep(0.02)
    time.sleep(0.1)
    with pytest.raises(RuntimeError), timer(Phase.INVERSION):
        raise RuntimeError
    seconds = timer.seconds()
    assert 0.04 <= seconds[Phase.REDUCTION] < 0.2
    assert seconds[Phase.STATISTICS] >= 0.2
    assert seconds[Phase.INVERSION] < 0.1
    assert seconds[Phase.PRECONDITIONING] == 0


def test_kfac_measures_its_phases_when_asked_and_nothing_else_changes() -> None:
    silent, model = _stepped("cpu", enabled=False)
    assert set(silent.monitor.phases.seconds().values()) == {0.0}
    began = time.perf_counter()
    timed, same = _stepped("cpu", enabled=True)
    took = time.perf_counter() - began
    seconds = timed.monitor.phases.seconds()
    assert all(value > 0 for value in seconds.values())
    assert sum(seconds.values()) < took
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


@needs_gpu
def test_events_measure_the_device_and_need_no_synchronisation(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    timer = PhaseTimer(device)
    timer.enabled = True
    torch.cuda.set_sync_debug_mode("error")
    try:
        with timer(Phase.STATISTICS):
            matrix @ matrix
            with timer(Phase.INVERSION):
                for _ in range(20):
                    matrix @ matrix
        timer.seconds()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    seconds = timer.seconds()
    assert seconds[Phase.INVERSION] > 5 * seconds[Phase.STATISTICS] > 0
    assert seconds[Phase.REDUCTION] == 0
    assert timer.seconds() == seconds

    monkeypatch.setattr(phases_module, "_MOST_MARKS", 16)
    for _ in range(100):
        with timer(Phase.REDUCTION):
            matrix.add_(0)
        torch.cuda.synchronize()
    assert len(timer._marks) <= 17, "marks of a loop that never asks are read on the way"
    assert timer.seconds()[Phase.REDUCTION] > 0


@needs_gpu
def test_kfac_measures_its_phases_on_a_gpu() -> None:
    kfac, _ = _stepped("cuda", enabled=True)
    torch.cuda.synchronize()
    assert all(value > 0 for value in kfac.monitor.phases.seconds().values())
