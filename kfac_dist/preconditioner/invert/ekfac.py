"""EKFAC over ranks: every rank squares its own samples' gradients in the owners' eigenbases, and the ranks add up.

    refresh      owners send eigenbases to *every* rank: each measures its own samples in them
    backward     window += Σ_b (Q_Gᵀ ∇_b Q_A)²                                    curvature/ekfac.py
    step         window over the ranks, all_reduce or to the blocks' owners ── S ← βS + (1−β)·window
    precondition Q_G [(Q_Gᵀ ∇ Q_A) / (S/w + λ)] Q_Aᵀ, where the block is preconditioned

S is a running average like a factor's, a pair (weighted sum, weight) under the same transaction. But it is used at
once, and so is reduced at every measurement for any `reduce_every`.

When a new basis comes into use, S is rotated into it (`moments.turn`), as the diagonal that it implies in the new
basis. Nothing is measured before there is a basis; until then a block has `d_G d_Aᵀ`, as `eigen`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from kfac_dist.config.schema import DistributionConfig, KFACConfig, ReduceEvery, Reduction
from kfac_dist.curvature.blocks import KroneckerBlock, LayerCall, MicroBatch
from kfac_dist.curvature.ekfac import level, second_moments, turn
from kfac_dist.curvature.factors import Side, Unit
from kfac_dist.curvature.inverses.payloads import Payloads
from kfac_dist.curvature.inverses.precondition import RescaledGroup
from kfac_dist.curvature.statistics import RunningAverages
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.distributed.movement.owner_buffer import share_segments
from kfac_dist.errors import CheckpointError
from kfac_dist.precision import torch_dtype, working
from kfac_dist.preconditioner.plan import Plan
from kfac_dist.preconditioner.reduce.reduction import FactorReduction
from kfac_dist.preconditioner.reduce.unit_buffer import UnitBuffer

LABEL = "moments"


class SecondMoments:
    """The second moments of all rescaled blocks on one rank.

    Args:
        plan: The whole plan.
        holders: Holder of the bases of each block's units here: its group, or a `Payloads` of other columns' blocks.
        column: The ranks that precondition the same blocks.
        comm: All ranks.
        config: Decay, precision and reduction.
        device: The layers' device.
    """

    def __init__(
        self,
        plan: Plan,
        holders: Mapping[str, Payloads],
        column: Communicator,
        comm: Communicator,
        config: KFACConfig,
        device: torch.device,
    ) -> None:
        self.plan = plan.of_moments()
        self._bases = {name: holders[plan.blocks[name].units[0].name] for name in self.plan.blocks}
        self._units = {unit.block: unit for unit in self.plan.units}
        self._groups = {name: held for name, held in self._bases.items() if isinstance(held, RescaledGroup)}
        scatters = config.distribution.reduction is Reduction.REDUCE_SCATTER and comm.size > 1
        self.averages = RunningAverages(
            self.plan.units,
            self.plan.owned(comm.rank) if scatters else self.plan.units,
            decay=config.curvature.decay,
            device=device,
            dtype=torch_dtype(config.curvature.factor_dtype),
            working=working(config),
            transient_window=scatters,
        )
        distribution = moments_distribution(config.distribution)
        self.reduction = FactorReduction(self.averages, self.plan, comm, distribution, label=LABEL)
        self._column = column
        self._rank = comm.rank
        column_index = plan.grid.column_of(comm.rank)
        self._wire = moments_wire(self.plan, column_index) if scatters and column.size > 1 else None
        self._ready: set[str] = set()
        self._open = False

    # ---- a step

    def begin(self, *, active: bool) -> None:
        """Prepare for a step; it is measured if it is `active` and there are bases."""
        self._open = active and bool(self._ready)
        if self._open:
            self.reduction.begin(())

    def measure(self, block: KroneckerBlock, calls: Sequence[LayerCall], batch: MicroBatch, *, counted: bool) -> None:
        """Add a block's squared per-sample gradients to the window; `counted` unless its terms have been counted."""
        if not self._open or block.name not in self._ready:
            return
        bases = self._bases[block.name]
        sums, count = second_moments(
            block, calls, batch, bases.basis(block.name, Side.A), bases.basis(block.name, Side.G)
        )
        self.averages.add_values(block.name, Side.S, sums.flatten(1))
        if counted:
            self.averages.add_count(block.name, Side.S, count)

    def finish(self, taken: Tensor) -> Tensor:
        """Reduce and use this step's measurements, if every rank takes the step; returns whether they do."""
        if not self._open:
            return taken
        self._open = False
        taken = self.reduction.finish(taken)
        self.publish()
        return taken

    # ---- a refresh

    def load(self, arrived: Iterable[tuple[Unit, Tensor]], holders: Mapping[str, Payloads]) -> None:
        """Load payloads, and turn the moments of their blocks into the new bases."""
        for name, own in groupby(arrived, key=lambda pair: pair[0].block):
            payloads = list(own)
            if name not in self._units:
                for unit, payload in payloads:
                    holders[unit.name].load(unit, payload)
                continue
            bases = self._bases[name]
            self._level(name)
            old = {side: [piece.clone() for piece in bases.basis(name, side)] for side in (Side.A, Side.G)}
            for unit, payload in payloads:
                bases.load(unit, payload)
            self._turn(name, old)
            self._ready.add(name)

    def publish(self) -> None:
        """Bring S/w to where blocks are preconditioned; collective where owners alone hold it."""
        if self._wire is not None:
            self._share(self._wire)
            return
        for name, group in self._groups.items():
            unit = self._units[name]
            weight = self._weight(unit)
            group.rescale(name, self._quotient(unit), weight > 0)

    # ---- checkpoints

    def held(self) -> dict[str, dict[str, Tensor]]:
        """Return this rank's state, by unit name: see `state`."""
        values = {}
        for unit in self.plan.units:
            entry = {
                "scalars": self.reduction.consolidated_scalars(unit).clone(),
                "ready": torch.tensor(unit.block in self._ready),
            }
            if self.reduction.keeps(unit):
                entry["sum"] = self.averages.sums(unit).clone()
            if unit.block in self._groups:
                entry["payload"] = self._groups[unit.block].moments(unit.block).flatten().clone()
            values[unit.name] = entry
        return values

    def restore(self, values: Mapping[str, Mapping[str, Tensor]] | None) -> None:
        """Load the result of `held`, after the bases.

        Raises:
            CheckpointError: It has no moments of a block, or some of another shape.
        """
        for unit in self.plan.units:
            entry = {} if values is None else values.get(unit.name, {})
            if not entry or ("sum" in entry and entry["sum"].numel() != unit.numel):
                raise CheckpointError(
                    f"the K-FAC state has no second moments of {unit.numel} values for {unit.block!r}: it was made by "
                    "another kfac.inversion.solver than ekfac, or belongs to another model"
                )
            self.reduction.restore(unit, entry.get("sum"), entry["scalars"], 1.0)
            (self._ready.add if bool(entry["ready"]) else self._ready.discard)(unit.block)
            if unit.block in self._groups:
                own = self._groups[unit.block].moments(unit.block)
                own.copy_(entry["payload"].view_as(own))

    # ---- inside

    def _level(self, name: str) -> None:
        bases, sums = self._bases[name], self._sums(name)
        if sums is not None:
            sums.copy_(
                level(sums.to(self.averages.working), bases.eigenvalues(name, Side.A), bases.eigenvalues(name, Side.G))
            )

    def _turn(self, name: str, old: Mapping[Side, Sequence[Tensor]]) -> None:
        bases, sums = self._bases[name], self._sums(name)
        if sums is not None:
            pairs = {side: list(zip(before, bases.basis(name, side), strict=True)) for side, before in old.items()}
            sums.copy_(turn(sums.to(self.averages.working), pairs[Side.A], pairs[Side.G]))

    def _sums(self, name: str) -> Tensor | None:
        """Return a block's running sum `[batch, d_out, d_in]`, a view; None where another rank keeps it."""
        unit = self._units[name]
        if unit not in self.averages.held:
            return None
        return self.averages.sums(unit).view(self.plan.blocks[name].matrix_shape)

    def _weight(self, unit: Unit) -> Tensor:
        return self.averages.scalars[0, self.averages.layout.index(unit)]

    def _quotient(self, unit: Unit) -> Tensor:
        weight = self._weight(unit)
        return self.averages.sums(unit).to(self.averages.working) / torch.where(weight > 0, weight, 1.0)

    def _share(self, wire: UnitBuffer) -> None:
        buffer = wire.sharing_buffer(self.averages.working, self.averages.device)
        for unit in wire.units:
            if self.plan.assignment.owners[unit.name] == self._rank:
                wire.put(buffer, unit, self._quotient(unit))
        share_segments(self._column, buffer, wire.layout, label=LABEL).wait()
        for unit in wire.units:
            values = wire.get(wire.layout.view(buffer, unit.name), unit)
            self._groups[unit.block].rescale(unit.block, values, self._weight(unit) > 0)


def moments_distribution(config: DistributionConfig) -> DistributionConfig:
    """Return how moments are reduced: at every measurement, and after backward.

    Beside the factors' buckets, during backward, two orders of collectives could cross.
    """
    return config.model_copy(update={"reduce_every": ReduceEvery.STEP, "overlap": False})


def moments_wire(plan: Plan, column: int) -> UnitBuffer:
    """Return the layout in which owners send S/w to the rest of a column.

    Args:
        plan: The plan of the moments.
        column: The column.
    """
    grid, owners = plan.grid, plan.assignment.owners
    units = [unit for unit in plan.units if plan.blocks[unit.block].column == column]
    return UnitBuffer(
        units,
        [grid.row_of(owners[unit.name]) for unit in units],
        grid.group_size,
        numel=lambda unit: unit.numel,
        packed=lambda unit: False,
    )
