"""The side thread: order, errors, and on a GPU that values are ready when they are used."""

from __future__ import annotations

import threading

import pytest
import torch

from kfac_dist.preconditioner.invert.background import BackgroundSolver

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
def test_work_is_done_in_order_beside_the_caller_and_sees_what_came_before(device: str) -> None:
    side = BackgroundSolver(torch.device(device))
    values = torch.ones(512, 512, device=device)
    for _ in range(20):
        values = values @ values / 512
    jobs = [side.start(lambda k=k: (values + k, threading.current_thread().name), [values]) for k in range(3)]
    results = [job.result(lambda found: [found[0]]) for job in jobs]
    for k, (found, thread) in enumerate(results):
        assert torch.equal(found.cpu(), torch.full((512, 512), 1.0 + k))
        assert thread.startswith("kfac-side")
        assert not found.requires_grad
    side.close()


def test_an_error_comes_to_who_asks_for_the_result() -> None:
    side = BackgroundSolver(torch.device("cpu"))

    def fails() -> int:
        raise ArithmeticError("planted")

    job = side.start(fails, [])
    with pytest.raises(ArithmeticError, match="planted"):
        job.result(lambda found: [])
    side.close()
    side.close()
