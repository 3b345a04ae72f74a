"""The logged loss: a mean over terms since the last one, and a clock that stands still when told."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from kfac_dist.distributed.communicators.base import SoloCommunicator
from kfac_dist.preconditioner.kfac import KFAC
from kfac_dist.training.records.window import Stopwatch, Window

SOLO = SoloCommunicator()
TAKEN = torch.tensor(True)


@pytest.mark.parametrize("on_device", [False, True])
def test_a_window_is_a_mean_over_its_terms(on_device: bool) -> None:
    window = Window(torch.device("cpu"))
    for total, terms in ((6.0, 3), (10.0, 5)):
        window.add_loss(torch.tensor(total, requires_grad=True))
        window.add_step(4, torch.tensor(terms) if on_device else terms, TAKEN)
    totals = window.close(SOLO, lambda: 2.0)
    assert (totals.loss, totals.samples_per_second) == (2.0, 4.0)
    window.add_loss(torch.tensor(3.0))
    window.add_step(1, 1, TAKEN)
    assert window.close(SOLO, lambda: 0.0).loss == 3.0


@pytest.mark.parametrize("on_device", [False, True])
def test_a_skipped_step_adds_neither_loss_nor_terms(on_device: bool) -> None:
    window = Window(torch.device("cpu"))
    for total, terms, taken in ((6.0, 3, True), (float("nan"), 5, False), (10.0, 5, True)):
        window.add_loss(torch.tensor(total))
        window.add_step(4, torch.tensor(terms) if on_device else terms, torch.tensor(taken))
    totals = window.close(SOLO, lambda: 2.0)
    assert (totals.loss, totals.skipped) == (2.0, 1)
    assert totals.first_bad is not None
    assert totals.first_bad[0] == 1
    window.add_loss(torch.tensor(1.0))
    window.add_step(1, 1, torch.tensor(False))
    assert math.isnan(window.close(SOLO, lambda: 1.0).loss)


def test_what_was_dropped_is_counted_since_the_last_close_and_goes_on_from_a_checkpoint() -> None:
    monitor = SimpleNamespace(dropped=torch.tensor(4), measured=7)
    kfac = cast(KFAC, SimpleNamespace(monitor=monitor))
    window = Window(torch.device("cpu"), [kfac])
    monitor.dropped, monitor.measured = torch.tensor(6), 10
    state, counts = window.state(), window.counts()
    totals = window.close(SOLO, lambda: 1.0)
    assert (totals.dropped, totals.measured) == (2, 3)
    resumed = Window(torch.device("cpu"), [kfac])
    resumed.restore(state, counts)
    monitor.dropped, monitor.measured = torch.tensor(7), 11
    totals = resumed.close(SOLO, lambda: 1.0)
    assert (totals.dropped, totals.measured) == (3, 4)
    totals = resumed.close(SOLO, lambda: 1.0)
    assert (totals.dropped, totals.measured) == (0, 0)


def test_a_reset_forgets() -> None:
    window = Window(torch.device("cpu"))
    window.add_loss(torch.tensor(3.0))
    window.add_step(1, 1, TAKEN)
    window.reset()
    assert window.close(SOLO, lambda: 1.0).loss == 0.0


def test_the_stopwatch_stands_still_and_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    watch = Stopwatch(5.0)
    watch.start()
    now = 2.0
    assert watch.seconds == 7.0
    watch.stop()
    now = 50.0
    assert watch.seconds == 7.0
    watch.start()
    now = 51.0
    assert watch.seconds == 8.0
