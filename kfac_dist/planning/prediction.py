"""The time that a strategy adds to a step: by kind and phase, averaged over a window, and in its worst step.

Nothing is hidden: collectives that overlap with backward, and inverses that travel while later steps run, count in
full. So a prediction is what a rank computes and waits for, and a run on GPUs may be quicker.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from kfac_dist.planning import work
from kfac_dist.planning.job import PlannedRun, StepKind
from kfac_dist.planning.machines.hardware import Hardware, Overhead
from kfac_dist.planning.machines.network import seconds_of
from kfac_dist.planning.strategies import Strategy
from kfac_dist.planning.traffic import RecordedTraffic, record_traffic
from kfac_dist.preconditioner.invert.refresh import LABEL as INVERSES
from kfac_dist.preconditioner.memory import RankBytes
from kfac_dist.preconditioner.precondition import transport
from kfac_dist.preconditioner.precondition.preconditioner import LABEL as LENGTH

PHASES = ("statistics", "reduction", "inversion", "sharing", "preconditioning", "gradients")


@dataclass(frozen=True)
class StepCost:
    """One kind of step.

    Attributes:
        seconds: Seconds that it adds to a step of the bare optimizer, by phase.
        recorded: Messages of the busiest rank.
        flops: Flops of the busiest rank.
    """

    seconds: Mapping[str, float]
    recorded: RecordedTraffic
    flops: float

    @property
    def total(self) -> float:
        """All phases together."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Prediction:
    """The cost of a strategy on W ranks.

    Attributes:
        strategy: The strategy.
        job: Its plan.
        samples: Samples that a rank has in a step.
        costs: Each kind of step.
        blocks: Seconds of an average step on the busiest rank, by block.
        memory: Of the rank that keeps most.
    """

    strategy: Strategy
    job: PlannedRun
    samples: float
    costs: Mapping[StepKind, StepCost]
    blocks: Mapping[str, Mapping[str, float]]
    memory: RankBytes

    @property
    def seconds(self) -> float:
        """Added to an average step."""
        return self._mean({kind: cost.total for kind, cost in self.costs.items()})

    @property
    def worst_seconds(self) -> float:
        """Added to the window's worst step."""
        return max(cost.total for cost in self.costs.values())

    @property
    def bytes_sent(self) -> float:
        """Sent by the busiest rank in an average step."""
        return self._mean({kind: cost.recorded.sent for kind, cost in self.costs.items()})

    @property
    def worst_bytes(self) -> int:
        """Sent by the busiest rank in the step in which it sends most."""
        return max(cost.recorded.sent for cost in self.costs.values())

    @property
    def worst_collectives(self) -> int:
        """Collectives of the step that has most."""
        return max(len(cost.recorded.calls) for cost in self.costs.values())

    @property
    def flops(self) -> float:
        """Of the busiest rank in an average step."""
        return self._mean({kind: cost.flops for kind, cost in self.costs.items()})

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of an average step by phase."""
        return {p: self._mean({kind: cost.seconds[p] for kind, cost in self.costs.items()}) for p in PHASES}

    def _mean(self, values: Mapping[StepKind, float]) -> float:
        kinds = self.job.kinds
        return sum(values[kind] * count for kind, count in kinds.items()) / kinds.total()


def predict(strategy: Strategy, job: PlannedRun, hardware: Hardware, batch_size: int) -> Prediction:
    """Return the costs that a strategy adds to the steps of a job.

    Args:
        strategy: Name of the job's configuration.
        job: The plan.
        hardware: The machine.
        batch_size: Samples of a step over all ranks.
    """
    samples = max(1.0, batch_size / job.world_size)
    alone = _Alone(job, hardware, samples)
    costs = {kind: alone.cost(kind) for kind in job.kinds}
    memory = max(job.memory, key=lambda rank: rank.total)
    return Prediction(strategy, job, samples, costs, alone.blocks(), memory)


class _Alone:
    """Phases that several kinds of steps have in common, worked out once."""

    def __init__(self, job: PlannedRun, hardware: Hardware, samples: float) -> None:
        self._job = job
        self._hardware = hardware
        self._slower = hardware.slower(job.node_size)
        self._statistics = work.statistics(job, hardware, samples)
        self._moments = work.moment_work(job, hardware, samples, job.busiest)
        columns = {*job.columns, job.plan.grid.column_of(job.busiest)}
        by_column = {column: work.preconditioning(job, hardware, column) for column in columns}
        self._column = by_column[job.plan.grid.column_of(job.busiest)]
        self._held = job.columns.get(job.plan.grid.column_of(job.busiest), ())
        # Every rank takes up all blocks' results, its column's alone set out from it.
        self._handled = (len(self._held) + len(job.plan.blocks)) / 2
        self._preconditioning = max(by_column.values(), key=lambda done: done.seconds)

    def cost(self, kind: StepKind) -> StepCost:
        """Return the costs of a kind of step."""
        job, hardware, rank = self._job, self._hardware, self._job.busiest
        sent = record_traffic(job, kind, rank)
        seconds = dict.fromkeys(PHASES, 0.0)
        for call in sent.calls:
            seconds[_phase_of(call.label)] += seconds_of(call, hardware, job.node_size)
        flops = self._column.flops
        fixed = self._fixed(hardware.preconditioning, self._handled)
        seconds["preconditioning"] += self._preconditioning.seconds * self._slower + fixed
        if kind.measured:
            share = self._measured(kind)
            count = sum(block.slot in kind.measured for block in job.plan.blocks.values())
            fixed = self._fixed(hardware.measuring, count)
            seconds["statistics"] += share * self._statistics.seconds * self._slower + fixed
            seconds["reduction"] += work.moving(job, hardware, kind, rank) * self._slower
            flops += share * self._statistics.flops
        if kind.moments:
            seconds["statistics"] += self._moments.seconds * self._slower
            flops += self._moments.flops
        if kind.slots:
            due = sum(job.plan.blocks[name].slot in kind.slots for name in self._held)
            seconds["inversion"] += self._inversion(kind) + self._fixed(hardware.refreshing, due)
            seconds["sharing"] += work.handing(job, hardware, kind, rank) * self._slower
            flops += work.inversion(job, hardware, kind, rank).flops
        return StepCost(seconds, sent, flops)

    def blocks(self) -> dict[str, dict[str, float]]:
        """Return the seconds of an average step on the busiest rank, by block and phase."""
        kinds = self._job.kinds
        found: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(PHASES, 0.0))
        for kind, count in kinds.items():
            share = count / kinds.total()
            parts = {"preconditioning": self._column}
            if kind.measured:
                parts["statistics"] = self._statistics
            if kind.slots:
                parts["inversion"] = work.inversion(self._job, self._hardware, kind, self._job.busiest)
            for phase, done in parts.items():
                for block, seconds in done.by_block.items():
                    if phase != "statistics" or self._job.plan.blocks[block].slot in kind.measured:
                        found[block][phase] += share * seconds * self._slower
        return dict(found)

    def _measured(self, kind: StepKind) -> float:
        """Return the share of all layers' statistics, by their seconds, that a step measures."""
        blocks, by_block = self._job.plan.blocks, self._statistics.by_block
        own = sum(seconds for name, seconds in by_block.items() if blocks[name].slot in kind.measured)
        return own / max(sum(by_block.values()), 1e-30)

    def _inversion(self, kind: StepKind) -> float:
        """Return the time at which the last rank has solved its due units: the slowest node's."""
        job, node = self._job, self._job.node_size
        owners = {
            job.plan.assignment.owners[u.name] for u in job.plan.units if job.plan.blocks[u.block].slot in kind.slots
        }
        loads = {rank: work.inversion(job, self._hardware, kind, rank).seconds for rank in owners}
        nodes: dict[int, list[float]] = defaultdict(list)
        for rank, load in loads.items():
            nodes[rank // node].append(load)
        return max((work.finishing(own, self._hardware) for own in nodes.values()), default=0.0)

    def _fixed(self, overhead: Overhead, count: float) -> float:
        """Return the fixed costs of a step with this number of blocks."""
        return (overhead.step + overhead.block * count) * self._slower


def _phase_of(label: str) -> str:
    match label:
        case _ if label == INVERSES or label == "classes":
            return "sharing"
        case transport.LABEL:
            return "gradients"
        case _ if label == LENGTH:
            return "preconditioning"
        case _:
            return "reduction"
