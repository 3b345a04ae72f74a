"""A damping that follows the trust region, the same on every rank and in a resumed run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_dist.config.schema import AdaptConfig
from kfac_dist.distributed.communicators.base import SoloCommunicator
from kfac_dist.errors import CheckpointError
from kfac_dist.preconditioner.invert.damping_rules import DampingAdaptation
from tests.harness import run_ranks
from tests.preconditioner.test_invariance import TOLERANCE, configuration
from tests.preconditioner.workloads import Run, relative


def _adaptation(**options: Any) -> DampingAdaptation:
    return DampingAdaptation(AdaptConfig(**options), SoloCommunicator(), torch.device("cpu"))


def _after(adaptation: DampingAdaptation, *scales: float) -> float:
    for scale in scales:
        adaptation.note(torch.tensor(scale))
    adaptation.judge()
    return adaptation.factor


def test_the_damping_rises_while_steps_are_cut_and_falls_while_they_fit() -> None:
    adaptation = _adaptation(every=2, rate=2.0, lowest=0.5, highest=4.0)
    assert _after(adaptation, 0.01) == 1  # one step isn't judged
    assert _after(adaptation, 0.15) == 2
    assert _after(adaptation, 0.2, 0.3) == 2
    assert [_after(adaptation, 0.05, 0.1) for _ in range(2)] == [4, 4]
    assert [_after(adaptation, 1.0, 1.0) for _ in range(4)] == [2, 1, 0.5, 0.5]


def test_a_step_that_is_not_finite_counts_as_cut_to_nothing() -> None:
    assert _after(_adaptation(every=2, rate=3.0), float("nan"), 0.1) == 3


def test_without_a_configuration_nothing_happens() -> None:
    adaptation = DampingAdaptation(None, SoloCommunicator(), torch.device("cpu"))
    assert _after(adaptation, *[0.0] * 50) == 1
    adaptation.load_state_dict(None)


def test_a_state_without_it_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"it was saved without kfac\.inversion\.adapt"):
        _adaptation().load_state_dict(None)


# κ so small that first steps are cut and later ones, near the minimum, are not.
CONFIG = {
    **configuration(inversion={"adapt": {"every": 3, "rate": 2.0}, "early_refresh": 0}, placement="owner"),
    "update": {"kl_clip": 1e-5},
}


def _train(steps: int, state: Any = None) -> tuple[dict[str, Tensor], list[float], Any]:
    run = Run("mlp", CONFIG)
    first = 0
    if state is not None:
        first = 10
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.kfac.load_state_dict(state["kfac"])
        run.kfac.solver_access.load_local_statistics(state["own"])
    dampings = []
    for step in range(first, steps):
        run.step(step)
        dampings.append(run.kfac.solver_access.damping)
    own = {name: value.clone() for name, value in run.kfac.solver_access.local_statistics().items()}
    kfac = run.kfac.state_dict()
    saved = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), "kfac": kfac, "own": own}
    found = run.parameters()
    run.close()
    return found, dampings, saved


def test_three_ranks_adapt_as_one_does_and_a_resumed_run_as_one_that_goes_on() -> None:
    [(alone, expected, _)] = run_ranks(1, _train, 20, process_group=False)
    assert max(expected) > expected[0] == 0.05
    for found, dampings, _ in run_ranks(3, _train, 20):
        assert dampings == expected
        assert relative(found, alone) <= TOLERANCE
    [(_, first, saved)] = run_ranks(1, _train, 10, process_group=False)
    [(resumed, rest, _)] = run_ranks(1, _train, 20, saved, process_group=False)
    assert first + rest == expected
    assert all(torch.equal(value, alone[name]) for name, value in resumed.items())
