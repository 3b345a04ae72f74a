"""λ, of what is configured, adapted, set and multiplied; what is no damping is refused."""

from __future__ import annotations

import pytest
import torch

from kfac_dist.config.schedules import Schedule, ScheduleKind
from kfac_dist.distributed.communicators.base import SoloCommunicator
from kfac_dist.errors import ConfigError
from kfac_dist.preconditioner.invert.damping import Damping
from kfac_dist.preconditioner.invert.damping_rules import DampingAdaptation

FALLING = Schedule(value=0.4, kind=ScheduleKind.LINEAR, final=0.2)


def damping(l2: float = 0.0) -> Damping:
    return Damping(FALLING, DampingAdaptation(None, SoloCommunicator(), torch.device("cpu")), 10, l2)


def test_it_is_what_is_configured_adapted_set_and_multiplied() -> None:
    own = damping()
    assert [own.at(step) for step in (0, 5, 10)] == pytest.approx([0.4, 0.3, 0.2])
    own.adaptation.factor = 2.0
    own.multiply(10.0)
    assert own.at(5) == pytest.approx(6.0)
    own.set(0.7)
    assert own.at(5) == pytest.approx(7.0)  # what is set is not adapted
    other = damping()
    other.load_state_dict(own.state_dict())
    assert other.at(5) == pytest.approx(7.0)
    other.set(None)
    assert other.at(5) == pytest.approx(3.0)
    again = damping()
    again.load_state_dict(other.state_dict())
    assert (again.own, again.factor) == (None, 10.0)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_damping_is_refused_and_changes_nothing(value: float) -> None:
    own = damping()
    with pytest.raises(ConfigError, match=r"multiply_damping\(.*positive number"):
        own.multiply(value)
    with pytest.raises(ConfigError, match=r"set_damping\(.*kfac.update.l2 \(0\).*positive"):
        own.set(value)
    assert own.at(0) == pytest.approx(0.4)


def test_weight_decay_counts_as_damping() -> None:
    own = damping(l2=1e-3)
    own.set(-1e-5)  # a search by γ² − η may round to it
    assert own.at(0) == -1e-5
