"""Trainings that are compared: points along them, settings drawn from grids, and a ledger of those that have ended."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Grid = dict[str, list[Any]]


@dataclass(frozen=True)
class Point:
    """A point of a run: optimizer steps, CPU seconds, loss of the whole training set."""

    step: int
    seconds: float
    loss: float


def until(points: Iterator[Point], target: float, most_seconds: float = math.inf) -> list[Point]:
    """Return a run's points up to the one that reaches the target (or has taken too long)."""
    taken = []
    for point in points:
        taken.append(point)
        if point.loss <= target or point.seconds > most_seconds:
            break
    return taken


def draws(grid: Grid, trials: int) -> list[dict[str, Any]]:
    """Return distinct settings of a grid, drawn by a fixed seed."""
    settings = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return random.Random(0).sample(settings, min(trials, len(settings)))


class Ledger:
    """Results of trainings that have ended, in a file if there is one."""

    def __init__(self, path: Path | None, pool: ProcessPoolExecutor) -> None:
        self._path = path
        self._pool = pool
        self._known: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.exists() else {}

    def all(self, function: Callable[..., Any], calls: list[tuple[Any, ...]]) -> list[Any]:
        """Return the function's value for each of the arguments, in processes of their own where it isn't known."""
        keys = [f"{function.__name__} {arguments!r}" for arguments in calls]
        running: dict[str, Future[Any]] = {
            key: self._pool.submit(function, *arguments)
            for key, arguments in zip(keys, calls, strict=True)
            if key not in self._known
        }
        for key, future in running.items():
            self._known[key] = future.result()
            if self._path is not None:
                self._path.write_text(json.dumps(self._known))
        return [self._known[key] for key in keys]
