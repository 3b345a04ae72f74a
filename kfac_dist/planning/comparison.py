"""All strategies on some numbers of ranks, and which one to take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import yaml
from torch import nn

from kfac_dist.config.schema import Config, EngineConfig, KFACConfig
from kfac_dist.curvature.block_tridiagonal_units import find_all
from kfac_dist.errors import ConfigError
from kfac_dist.planning.job import Model, PlannedRun
from kfac_dist.planning.machines.hardware import Hardware
from kfac_dist.planning.machines.network import check_network
from kfac_dist.planning.prediction import Prediction, predict
from kfac_dist.planning.rows import count_rows
from kfac_dist.planning.strategies import AXES, Changes, Strategy, crossed, distributions
from kfac_dist.precision import settled

# A strategy that gains less than this isn't worth a change of the configuration.
WORTH = 0.03
# A recommended strategy's worst step may be so much longer than the configured one's.
LONGER = 1.05
# Number of fastest strategies that are crossed with further axes, besides the recommended ones.
QUICKEST = 2
# Share of a device's memory that K-FAC may take beside model, optimizer and activations.
MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class Comparison:
    """The costs of strategies on one number of ranks.

    Attributes:
        world_size: The ranks.
        hardware: The machine.
        predictions: Every strategy, the quickest first.
        note: Costs that aren't known, if any.
    """

    world_size: int
    hardware: Hardware
    predictions: Sequence[Prediction]
    note: str

    @property
    def configured(self) -> Prediction:
        """The configuration as it stands."""
        return next(found for found in self.predictions if found.strategy.configured)

    @property
    def best(self) -> Prediction:
        """The quickest that fits into memory, takes the same steps and has no longer worst one.

        The configured one, if that is near it.
        """
        return self._quickest([found for found in self.predictions if found.strategy.same_mathematics])

    @property
    def quicker(self) -> Prediction | None:
        """The quickest of all, with other mathematics, if it is worth a thought."""
        found = self._quickest(self.predictions)
        gains = found.seconds < (1 - WORTH) * self.best.seconds
        return found if gains and not found.strategy.same_mathematics else None

    @property
    def promising(self) -> list[Strategy]:
        """Strategies to vary further: the recommended ones, and the fastest.

        The fastest may be too large: cutting factors makes them smaller.
        """
        named = (self.best, self.quicker, *self.predictions[:QUICKEST])
        return [found.strategy for found in self.predictions if any(found is one for one in named)]

    def fits(self, prediction: Prediction) -> bool:
        """Whether K-FAC's state leaves room for the model."""
        limit = self.hardware.memory_bytes
        return limit is None or prediction.memory.total <= MEMORY_SHARE * limit

    def _quickest(self, found: Sequence[Prediction]) -> Prediction:
        longest = LONGER * self.configured.worst_seconds
        fitting = [one for one in found if self.fits(one) and one.worst_seconds <= longest]
        if not fitting:  # then the least
            return min(found, key=lambda one: (one.memory.total, one.seconds))
        best = min(fitting, key=lambda one: one.seconds)
        near = self.fits(self.configured) and self.configured.seconds * (1 - WORTH) <= best.seconds
        return self.configured if near and self.configured in found else best


def compare(
    config: Config, model: nn.Module, hardware: Hardware, sizes: Sequence[int], node_size: int
) -> list[Comparison]:
    """Compare strategies on each number of ranks.

    Args:
        config: The run.
        model: Its model, on the device `meta`.
        hardware: The machine.
        sizes: Numbers of ranks.
        node_size: Ranks of a node.

    Raises:
        ConfigError: The configuration doesn't fit a number of ranks, or the hardware knows no network.
        ModelError: The model has no block.
    """
    check_network(hardware, sizes)
    coverage = find_all(model, config.kfac)
    kfac = settled(config.kfac, (p for block in coverage.blocks for p in block.parameters.values()))
    rows, unknown = count_rows(model, coverage.blocks, config.data)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    uncovered = {name: trained[name] for name in coverage.uncovered if name in trained}
    known = Model(coverage.blocks, uncovered, rows)
    without = [block.name for block in coverage.blocks if block.name not in rows]
    note = f"statistics are not in the times: {unknown}" if unknown else ""
    if without and not unknown:
        note = f"statistics of {len(without)} blocks that the forward pass doesn't call are not in the times"
    return [
        _compare(kfac, _Ranks(size, node_size, hardware, known, config.engine, config.train.batch_size), note)
        for size in sizes
    ]


@dataclass(frozen=True)
class _Ranks:
    """A number of ranks on a machine, and what they train."""

    size: int
    node_size: int
    hardware: Hardware
    model: Model
    engine: EngineConfig
    batch_size: int

    def predictions(self, grid: Iterable[Strategy]) -> list[Prediction]:
        """Return the predicted costs of strategies, the fastest first."""
        predictions = []
        for strategy in grid:
            try:
                job = PlannedRun.of(self.model, strategy.config, self.engine, self.size, self.node_size)
            except ConfigError:
                if strategy.configured:
                    raise
                continue  # a placement that doesn't fit these ranks is no strategy
            predictions.append(predict(strategy, job, self.hardware, self.batch_size))
        return _sorted(predictions)


def _compare(kfac: KFACConfig, ranks: _Ranks, note: str) -> Comparison:
    sharded = ranks.engine.shard_size(ranks.size) > 1
    node_size = min(ranks.node_size, ranks.size)
    grid = distributions(kfac, world_size=ranks.size, node_size=node_size, sharded=sharded)
    found = Comparison(ranks.size, ranks.hardware, ranks.predictions(grid), note)
    for axis in AXES:
        more = ranks.predictions(crossed(kfac, found.promising, axis, ranks.model.blocks))
        found = replace(found, predictions=_sorted([*found.predictions, *more]))
    return found


def _sorted(predictions: Iterable[Prediction]) -> list[Prediction]:
    return sorted(predictions, key=lambda found: found.seconds)


def fragment(strategy: Strategy) -> str:
    """Return a strategy's changes as YAML to be pasted over the section `kfac`; a comment if there are none."""
    if strategy.configured:
        return "# nothing to change\n"
    return yaml.safe_dump({"kfac": strategy.changes}, sort_keys=False)


def words(strategy: Strategy) -> str:
    """Return a strategy's changes in one line."""
    if strategy.configured:
        return "as configured"
    return words_of(strategy.changes)


def words_of(changes: Changes) -> str:
    """Return changes in a line."""
    return ", ".join(f"{key} {_shown(value)}" for own in changes.values() for key, value in own.items())


def _shown(value: object) -> str:
    match value:
        case None:
            return "none"
        case float() if not math.isclose(value, round(value)):
            return f"{value:.4g}"
        case _:
            return str(value)
