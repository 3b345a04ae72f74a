"""A captured state brings back the same draws from every generator."""

from __future__ import annotations

import random

import numpy as np
import torch

from kfac_dist.training.checkpoints.random_state import capture_random_state, restore_random_state, seed_everything


def _draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()]


def test_restoring_repeats_the_draws() -> None:
    seed_everything(3, rank=1)
    _draw()  # leaves half of a pair of normal numbers in Python's and NumPy's generators
    state = capture_random_state()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    expected = [_draw(), _draw()]
    restore_random_state(state)
    assert [_draw(), _draw()] == expected


def test_ranks_draw_differently_and_repeatably() -> None:
    draws = []
    for rank in (0, 1, 0):
        seed_everything(7, rank)
        draws.append(_draw())
    assert draws[0] == draws[2]
    assert all(a != b for a, b in zip(draws[0], draws[1], strict=True))
