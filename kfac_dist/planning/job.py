"""A job that is planned and not run: the model's blocks, a configuration and a number of ranks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from kfac_dist.config.schema import EngineConfig, EngineName, KFACConfig, Precision
from kfac_dist.curvature.blocks import Block
from kfac_dist.curvature.factors import Unit
from kfac_dist.curvature.statistics import FlatUnits
from kfac_dist.distributed.movement.exchange import ExchangePlan, plan_exchange
from kfac_dist.distributed.movement.gradient_layout import GradientLayout, ParameterSlices, Slice
from kfac_dist.precision import working
from kfac_dist.preconditioner.invert.ekfac import moments_distribution
from kfac_dist.preconditioner.invert.refresh_schedule import RefreshSchedule
from kfac_dist.preconditioner.memory import RankBytes, rank_bytes
from kfac_dist.preconditioner.plan import Plan, build_plan, exchange_buckets
from kfac_dist.preconditioner.precondition.transport import exchange_parts
from kfac_dist.preconditioner.reduce.buckets import BucketPlan


@dataclass(frozen=True)
class Model:
    """The planner's view of a model; tensors may be without memory.

    Attributes:
        blocks: Its blocks.
        uncovered: Trained parameters without a block, and their elements.
        rows: Rows that a sample adds to each block's factors, as far as they are known.
    """

    blocks: Sequence[Block]
    uncovered: Mapping[str, int]
    rows: Mapping[str, float]


@dataclass(frozen=True)
class StepKind:
    """The work of a step beside preconditioning.

    Attributes:
        measured: The slots whose factors it measures.
        diagonal: Whether it measures the parameters that no block covers.
        moments: Whether it measures EKFAC's second moments.
        slots: The slots whose inverses it refreshes.
    """

    measured: tuple[int, ...]
    diagonal: bool
    moments: bool
    slots: tuple[int, ...]

    @classmethod
    def at(cls, schedule: RefreshSchedule, step: int) -> StepKind:
        """Return the kind of one step."""
        return cls(schedule.measured(step), schedule.begins_round(step), schedule.rescales(step), schedule.due(step))


def kinds_of(schedule: RefreshSchedule) -> Counter[StepKind]:
    """Return the kinds of steps in one window of `inverse_every` steps after the start, and how many of each."""
    return Counter(StepKind.at(schedule, schedule.inverse_every + step) for step in range(schedule.inverse_every))


@dataclass(frozen=True)
class PlannedRun:
    """One configuration on W ranks.

    Attributes:
        model: The model.
        config: Its preconditioning.
        engine: The engine, which holds the gradients.
        plan: Assignment of work to ranks.
        node_size: Ranks of a node.
    """

    model: Model
    config: KFACConfig
    engine: EngineConfig
    plan: Plan
    node_size: int

    @classmethod
    def of(cls, model: Model, config: KFACConfig, engine: EngineConfig, world_size: int, node_size: int) -> PlannedRun:
        """Plan a job.

        Raises:
            ConfigError: The placement doesn't fit the number of ranks, or the engine's shards.
        """
        node = min(node_size, world_size)
        plan = build_plan(
            model.blocks,
            config,
            world_size=world_size,
            local_world_size=node,
            shard_size=engine.shard_size(world_size),
        )
        return cls(model, config, engine, plan, node)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.plan.grid.world_size

    @property
    def shard_size(self) -> int:
        """Consecutive ranks that together hold each gradient once."""
        return self.engine.shard_size(self.world_size)

    @property
    def sharded(self) -> bool:
        """Whether ranks hold slices of gradients."""
        return self.shard_size > 1

    @cached_property
    def kinds(self) -> Counter[StepKind]:
        """The kinds of steps in one window, and how many there are of each."""
        return kinds_of(RefreshSchedule.of(self.config))

    @cached_property
    def owned(self) -> Mapping[int, Sequence[Unit]]:
        """Return each rank's inversions."""
        found: dict[int, list[Unit]] = {}
        for unit in self.plan.units:
            found.setdefault(self.plan.assignment.owners[unit.name], []).append(unit)
        return found

    @cached_property
    def columns(self) -> Mapping[int, Sequence[str]]:
        """The blocks that each column preconditions, if any."""
        found: dict[int, list[str]] = {}
        for name, block in self.plan.blocks.items():
            found.setdefault(block.column, []).append(name)
        return found

    @cached_property
    def elements(self) -> int:
        """Elements of all blocks' gradients."""
        return sum(math.prod(block.matrix_shape) for block in self.plan.blocks.values())

    @cached_property
    def busiest(self) -> int:
        """The rank with the most to invert; the first of several."""
        load = self.plan.assignment.load()
        return load.index(max(load))

    @cached_property
    def memory(self) -> list[RankBytes]:
        """Return each rank's payloads."""
        return rank_bytes(self.plan, self.config, sharded=self.sharded)

    @cached_property
    def reduction(self) -> BucketPlan:
        """Return the reduction of factors."""
        return BucketPlan(
            self.plan, self.config.distribution, FlatUnits(self.plan.units), self.world_size, working(self.config)
        )

    @cached_property
    def moments(self) -> tuple[Plan, BucketPlan] | None:
        """The plan of EKFAC's second moments, and how they are reduced; None without any."""
        plan = self.plan.of_moments()
        if not plan.units:
            return None
        distribution = moments_distribution(self.config.distribution)
        return plan, BucketPlan(plan, distribution, FlatUnits(plan.units), self.world_size, working(self.config))

    @cached_property
    def gradients(self) -> GradientLayout:
        """Return the slices of gradients that a row's ranks hold.

        FSDP2's and ZeRO-3's are theirs. DeepSpeed's stages 1 and 2 flatten parameters in an order, and with a padding,
        that only its optimizer knows: here they are in the model's order, so that its exchange is a good estimate.
        """
        shapes = {
            name: tuple(parameter.shape) for block in self.model.blocks for name, parameter in block.parameters.items()
        }
        return _gradient_layout(tuple(shapes.items()), self.engine.name, self.shard_size)

    def exchanges(self, row_rank: int) -> Sequence[ExchangePlan]:
        """Return the elements that a rank of a row sends and receives of sharded gradients, bucket by bucket."""
        if row_rank not in self._exchanges:
            blocks = {block.name: block for block in self.model.blocks}
            buckets = zip(*exchange_buckets(self.plan, self.config.distribution.buckets), strict=True)
            inside = [[blocks[name] for part in bucket for name in part] for bucket in buckets]
            parts = [[p for block in own for p in exchange_parts(block, self.gradients, self.plan)] for own in inside]
            self._exchanges[row_rank] = [plan_exchange(self.gradients, own, row_rank) for own in parts]
        return self._exchanges[row_rank]

    @cached_property
    def _exchanges(self) -> dict[int, Sequence[ExchangePlan]]:
        return {}

    @property
    def exchanges_bf16(self) -> bool:
        """Whether sharded gradients travel in bf16: DeepSpeed's do that are held so."""
        return self.engine.name is not EngineName.FSDP2 and self.engine.precision is Precision.BFLOAT16


@lru_cache(maxsize=4)
def _gradient_layout(
    parameters: tuple[tuple[str, tuple[int, ...]], ...], engine: EngineName, size: int
) -> GradientLayout:
    """Return the layout of parameters of these names and shapes; every strategy on as many ranks has the same."""
    shapes = dict(parameters)
    if engine is EngineName.FSDP2:
        return GradientLayout(tuple(ParameterSlices.rows(name, s, size) for name, s in shapes.items()), size)
    if engine is EngineName.ZERO3:
        cut = {name: _cuts(0, math.prod(shape), -(-math.prod(shape) // size)) for name, shape in shapes.items()}
    else:
        share = -(-sum(math.prod(shape) for shape in shapes.values()) // size)
        cut, start = {}, 0
        for name, shape in shapes.items():
            cut[name] = _cuts(start, math.prod(shape), share)
            start += math.prod(shape)
    return GradientLayout(tuple(ParameterSlices.sharded(n, shapes[n], own) for n, own in cut.items()), size)


def _cuts(start: int, numel: int, share: int) -> list[Slice]:
    """Return slices, by rank, of elements from `start` on in a buffer of which each rank holds `share` elements."""
    first, last = start // share, (start + numel - 1) // share
    return [
        Slice(rank, max(start, rank * share) - start, min(start + numel, (rank + 1) * share) - start)
        for rank in range(first, last + 1)
    ]
