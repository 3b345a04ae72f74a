"""Sharded gradients, wherever they are cut: the same parameters as one process; and what overlaps with what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import KFAC
from kfac_dist.config.yaml.options import parse_kfac
from kfac_dist.curvature.blocks import find_blocks
from kfac_dist.curvature.inverses.precondition import Group, InverseGroup
from kfac_dist.distributed.communicators.base import SoloCommunicator, Work
from kfac_dist.errors import ConfigError
from kfac_dist.preconditioner.plan import build_plan, exchange_buckets
from tests.harness import run_ranks
from tests.preconditioner import workloads
from tests.preconditioner.slices import SlicedEngine
from tests.preconditioner.test_invariance import STEPS, TOLERANCE, configuration
from tests.preconditioner.workloads import Run, deep, relative


class AttentionNet(nn.Module):
    """Fused attention: q, k and v share one parameter, and may have three owners."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, workloads.CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = inputs.unflatten(1, (-1, 6))
        return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


workloads.MODELS["attention"] = AttentionNet
workloads.INPUTS["attention"] = lambda g: torch.randn(workloads.GLOBAL_BATCH, 18, generator=g)

CASES: list[tuple[str, dict[str, Any]]] = [
    ("mlp", configuration()),
    ("mlp", configuration("eigen", reduction="reduce_scatter", reduce_every="step", buckets=2)),
    ("mlp", configuration(inversion={"max_factor_dim": 4}, buckets=1, assignment="balanced")),
    ("mlp", configuration("newton_schulz", fisher="mc", inversion={"stagger": 2, "inverse_lag": 1})),
    ("conv", configuration(buckets=16)),
    ("token", configuration(curvature={"loss_terms": "token"}, reduction="reduce_scatter")),
    ("attention", configuration(assignment="balanced")),
    ("attention", {**configuration(), "update": {"l2": 0.01}}),
]


class ShardedRun(Run):
    """A run whose K-FAC sees slices only."""

    def __init__(self, name: str, config: dict[str, Any], shard_size: int) -> None:
        super().__init__(name, config)
        self.kfac.remove()
        weights = [3, 5, 0, 2][:shard_size]  # uneven, and a rank without anything
        self.engine = SlicedEngine(self.wrapped, shard_size, weights)
        self.kfac = KFAC(self.engine, config, optimizer=self.optimizer)

    def step(self, step: int) -> float:
        loss = self.gradients(step)
        self.kfac.step()
        self.engine.complete()
        self.optimizer.step()
        return loss


def train(shard_size: int | None) -> list[dict[str, Tensor]]:
    results = []
    for name, config in CASES:
        run = Run(name, config) if shard_size is None else ShardedRun(name, config, shard_size)
        results.append(run.train(STEPS))
        run.close()
    return results


@pytest.fixture(scope="module")
def one_process() -> list[dict[str, Tensor]]:
    return train(None)


@pytest.mark.parametrize(("size", "shard_size"), [(1, 1), (2, 2), (3, 3), (4, 4), (4, 2)])
def test_slices_change_nothing(one_process: list[dict[str, Tensor]], size: int, shard_size: int) -> None:
    for result in run_ranks(size, train, shard_size, timeout=180):
        for (name, config), parameters, wanted in zip(CASES, result, one_process, strict=True):
            assert relative(parameters, wanted) < TOLERANCE, (name, config)


def test_a_placement_that_needs_whole_gradients_is_refused() -> None:
    config = parse_kfac({"distribution": {"placement": "replicated"}})
    blocks = find_blocks(deep(3), config.curvature).blocks
    with pytest.raises(ConfigError, match=r"placement: replicated needs every gradient whole .* use owner or auto"):
        build_plan(blocks, config, world_size=4, shard_size=2)


def test_buckets_are_even_and_keep_like_blocks_together() -> None:
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(6, 8), nn.Linear(8, 6))))
    config = parse_kfac({})
    plan = build_plan(find_blocks(model, config.curvature).blocks, config, world_size=2, shard_size=2)
    for column, buckets in enumerate(exchange_buckets(plan, 2)):
        assert sorted(name for bucket in buckets for name in bucket) == sorted(plan.column_blocks(column))
        assert len(buckets) == 2
        assert all(len({plan.blocks[name].likeness for name in bucket}) == 1 for bucket in buckets)


class Log(SoloCommunicator):
    """One rank that notes when an exchange sets out and when it is waited for."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events
        self._count = 0

    def all_to_all(
        self, output: Tensor, input: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], *, label: str
    ) -> Work:
        super().all_to_all(output, input, output_splits, input_splits, label=label)
        self._count += 1
        self.events.append(f"start {self._count}")
        return _Noted(self.events, self._count)


class _Noted:
    def __init__(self, events: list[str], number: int) -> None:
        self._events, self._number = events, number

    def wait(self) -> None:
        self._events.append(f"wait {self._number}")


class LoggedEngine(SlicedEngine):
    """On one rank, with a communicator that keeps a log."""

    events: list[str]

    def communicator(self, timeout_seconds: float, *backend: Any) -> Log:
        return Log(self.events)


def test_a_bucket_is_preconditioned_while_others_are_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(3, 2))
    engine = LoggedEngine(model, 1, [1])
    engine.events = events
    kfac = KFAC(engine, {"update": {"kl_clip": None}, "distribution": {"buckets": 3}})
    apply = InverseGroup.apply

    def noted(group: Group, gradient: Tensor, damping: float) -> Tensor:
        events.append(f"precondition {group.blocks[0].name}")
        return apply(group, gradient, damping)

    monkeypatch.setattr(InverseGroup, "apply", noted)
    F.cross_entropy(model(torch.randn(6, 5)), torch.arange(6) % 2).backward()
    kfac.step()
    assert events == [
        *("start 1", "start 2", "start 3"),
        *("wait 1", "precondition 0", "start 4"),
        *("wait 2", "precondition 1", "start 5"),
        *("wait 3", "precondition 2", "start 6"),
        *("wait 4", "wait 5", "wait 6"),
    ]
