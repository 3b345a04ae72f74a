"""What is really solved, as tests and benchmarks count it: below everything that decides what is due."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from kfac_dist.curvature.factors import Unit
from kfac_dist.curvature.inverses.solvers import Task
from kfac_dist.preconditioner.invert import unit_solver as solving


@contextmanager
def solved_units() -> Iterator[list[Unit]]:
    """Yield a list to which every unit is added each time that it is solved, until the context ends."""
    found: list[Unit] = []
    real = solving.solve

    def solve(tasks: Sequence[Task], *args: Any, **kwargs: Any) -> Any:
        found.extend(task.unit for task in tasks)
        return real(tasks, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solving, "solve", solve)
        yield found
