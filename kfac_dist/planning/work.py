"""The work of one rank in each phase: flops, seconds, and the blocks they are for.

    statistics       A and G of M rows: (a² + g²)·M flops; then the running averages move
    inversion        the rank's own units that are due, equal sizes in one batch
    preconditioning  2ag(a + g) flops a block of the rank's column, and gradients in and out

Bytes that are copied count reads and writes: the passes that `RunningAverages`, `FactorReduction`,
`Refresh` and the transports make over their buffers. All seconds are of a rank that computes alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kfac_dist.config.schema import DType, Reduction, Solver
from kfac_dist.curvature.factors import FactorKind, Side, Unit
from kfac_dist.curvature.inverses.solvers import is_eigen, payload_numel
from kfac_dist.planning.job import PlannedRun, StepKind
from kfac_dist.planning.machines.hardware import Hardware
from kfac_dist.preconditioner.memory import keeps_own_factors_only
from kfac_dist.preconditioner.plan import BlockPlan

_FLOAT = 4
# Products of n×n matrices that Newton–Schulz takes from the last inverse on: two an iteration, and a look at both ends.
_NEWTON_SCHULZ_PRODUCTS = 10


@dataclass
class Work:
    """The work of one rank in one phase.

    Attributes:
        flops: Floating-point operations.
        seconds: Time of that, copies included.
        by_block: The part of it that belongs to each block.
    """

    flops: float = 0.0
    seconds: float = 0.0
    by_block: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, block: str, seconds: float, flops: float = 0.0) -> None:
        """Count something that is done for a block."""
        self.flops += flops
        self.seconds += seconds
        self.by_block[block] += seconds


def statistics(job: PlannedRun, hardware: Hardware, samples: float) -> Work:
    """Return the work of a rank to measure factors of its samples, without communication."""
    work = Work()
    share = job.config.curvature.sample_fraction
    for block in job.model.blocks:
        rows = job.model.rows.get(block.name, 0.0) * samples * share
        for unit in job.plan.blocks[block.name].units:
            seconds, flops = _measured(unit, rows, hardware)
            work.add(block.name, seconds, flops)
    return work


def _measured(unit: Unit, rows: float, hardware: Hardware) -> tuple[float, float]:
    match unit.kind:
        case FactorKind.DENSE if unit.side is not Side.F:
            return hardware.gram_seconds(rows, unit.dim, unit.batch), rows * unit.dim**2 * unit.batch
        case FactorKind.CROSS:
            flops = 2 * rows * unit.dim * unit.columns
            return hardware.product_seconds(unit.dim, unit.columns, max(1, round(rows)), DType.FLOAT32), flops
        case FactorKind.DENSE:  # scale and shift: a normalised copy, their products and their sums
            passes = 8 + 3 * unit.dim * (unit.dim + 1) / 2
            return hardware.copy_seconds(passes * _FLOAT * rows * unit.batch), passes * rows * unit.batch
        case _:  # counts of tokens
            return hardware.copy_seconds(4 * _FLOAT * rows), rows


def moving(job: PlannedRun, hardware: Hardware, kind: StepKind, rank: int) -> float:
    """Return the seconds in which a rank updates its averages by a step's window, without communication."""
    layout = job.reduction
    reduced = layout.at(kind.slots, kind.measured)
    local = sum(span.stop - span.start for span in reduced.local)
    sent = sum(span.stop - span.start for span, _ in reduced.buckets)
    owners = job.plan.assignment.owners
    own = sum(
        unit.statistics.numel
        for span, _ in reduced.buckets
        for unit in job.plan.units[span.units]
        if owners[unit.name] == rank
    )
    values = 3.0 * local
    if sent:
        values += 5.0 * sent if layout.blending else 0.0
        if layout.scattering:
            values += 2 * sent + own * (3 * job.world_size + 4) + (sent if layout.blending else 0.0)
        else:
            staged = any(wire is not None for _, wire in reduced.buckets)
            values += (6.0 if staged else 0.0) * sent + (2.0 if layout.blending else 3.0) * sent
    if keeps_own_factors_only(job.config, job.world_size):
        values += 2.0 * sent  # a window made anew
    return hardware.copy_seconds(_FLOAT * values)


def inversion(job: PlannedRun, hardware: Hardware, kind: StepKind, rank: int) -> Work:
    """Return a rank's solves in a step."""
    work = Work()
    solver = job.config.inversion.solver
    due = [unit for unit in job.owned.get(rank, ()) if job.plan.blocks[unit.block].slot in kind.slots]
    alike: dict[tuple[int, bool], list[Unit]] = defaultdict(list)
    for unit in due:
        if unit.kind is FactorKind.DIAGONAL:
            work.add(unit.block, hardware.copy_seconds(3 * _FLOAT * unit.numel), unit.numel)
        else:
            alike[unit.columns or unit.dim, is_eigen(unit, solver)].append(unit)
    for (n, eigen), units in alike.items():
        count = sum(unit.batch for unit in units)
        seconds = _solved(n, count, solver, hardware, eigen=eigen)
        for unit in units:
            flops = unit.cost * (9 if eigen else 2 * _NEWTON_SCHULZ_PRODUCTS if solver is Solver.NEWTON_SCHULZ else 1)
            work.add(unit.block, seconds * unit.batch / count, flops)
    return work


def _solved(n: int, count: int, solver: Solver, hardware: Hardware, *, eigen: bool) -> float:
    if solver is Solver.NEWTON_SCHULZ:
        return hardware.product_seconds(n, n, n, DType.FLOAT32, _NEWTON_SCHULZ_PRODUCTS * count)
    return hardware.solve_seconds(n, count, eigen=eigen)


def handing(job: PlannedRun, hardware: Hardware, kind: StepKind, rank: int) -> float:
    """Return the seconds in which a rank puts payloads on the wire and takes up those of its column's blocks."""
    solver, pack = job.config.inversion.solver, job.config.distribution.pack_triangles
    column = job.plan.grid.column_of(rank)
    units = [u for u in job.plan.units if job.plan.blocks[u.block].slot in kind.slots]
    held = sum(payload_numel(u, solver) for u in units if job.plan.blocks[u.block].column == column)
    own = sum(payload_numel(u, solver) for u in units if job.plan.assignment.owners[u.name] == rank)
    passes = 2.0 * held
    if job.plan.grid.group_size > 1:
        passes += 2.0 * own + (4.0 * held if pack else 0.0)
    return hardware.copy_seconds(_FLOAT * passes)


def preconditioning(job: PlannedRun, hardware: Hardware, column: int) -> Work:
    """Return the work of a column's ranks on their blocks' gradients, and on all ranks' results."""
    work = Work()
    plan = job.plan
    alike: dict[object, list[BlockPlan]] = defaultdict(list)
    for name in job.columns.get(column, ()):
        alike[plan.blocks[name].likeness].append(plan.blocks[name])
    for blocks in alike.values():
        seconds, flops = _products(blocks, job, hardware)
        for block in blocks:
            # Into the workspace, the product with the gradient, the scale, and on to the buffer of a row.
            passes = (2 + 2 + 2 + 2 * (plan.grid.columns > 1)) * math.prod(block.matrix_shape)
            copies = hardware.copy_seconds(_FLOAT * passes)
            work.add(block.name, seconds / len(blocks) + copies, flops / len(blocks))
    written = job.elements / job.shard_size if job.sharded else job.elements
    work.seconds += hardware.copy_seconds(_FLOAT * 2 * written)
    return work


def _products(blocks: Sequence[BlockPlan], job: PlannedRun, hardware: Hardware) -> tuple[float, float]:
    """Return seconds and flops of the batched products of like blocks."""
    first = blocks[0]
    batch, d_out, d_in = first.matrix_shape
    eigen = any(is_eigen(unit, job.config.inversion.solver) for unit in first.units)
    dtype = job.config.inversion.inverse_dtype
    times = 2 if eigen else 1
    seconds = flops = 0.0
    for unit in first.units:
        if unit.kind is not FactorKind.DENSE or unit.side is Side.F:
            continue
        rows, columns = (d_out, unit.dim) if unit.side is Side.A else (unit.dim, d_in)
        count = times * unit.batch * len(blocks)
        seconds += hardware.product_seconds(rows, columns, unit.dim, dtype, count)
        flops += 2.0 * rows * columns * unit.dim * count
    elements = batch * d_out * d_in * len(blocks)
    diagonal = sum(unit.kind is FactorKind.DIAGONAL or unit.side is Side.F for unit in first.units)
    passes = 3 * diagonal + (4 if eigen else 0) + (3 if dtype is DType.BFLOAT16 else 0)
    return seconds + hardware.copy_seconds(_FLOAT * passes * elements), flops


def moment_work(job: PlannedRun, hardware: Hardware, samples: float, rank: int) -> Work:
    """Return the work of EKFAC's measurement of second moments: a gradient per sample, rotated into the basis."""
    work = Work()
    if job.moments is None:
        return work
    plan, layout = job.moments
    scatters = layout.scattering and job.config.distribution.reduction is Reduction.REDUCE_SCATTER
    for block in plan.blocks.values():
        batch, d_out, d_in = block.matrix_shape
        rows = max(1.0, job.model.rows.get(block.name, 1.0)) * samples * job.config.curvature.sample_fraction
        turning = hardware.product_seconds(max(1, round(rows)), d_in, d_in, DType.FLOAT32, batch)
        turning += hardware.product_seconds(max(1, round(rows)), d_out, d_out, DType.FLOAT32, batch)
        adding = hardware.product_seconds(d_out, d_in, max(1, round(rows)), DType.FLOAT32, batch)
        flops = 2 * rows * batch * (d_in**2 + d_out**2 + d_in * d_out)
        work.add(block.name, turning + adding, flops)
    held = plan.owned(rank) if scatters else plan.units
    work.seconds += hardware.copy_seconds(_FLOAT * 5 * sum(unit.numel for unit in held))
    return work


def finishing(loads: Iterable[float], hardware: Hardware) -> float:
    """Return the time of the last of a node's ranks, if working ranks slow each other down.

    Args:
        loads: Seconds that each rank's load takes it alone.
        hardware: Knows by how much.
    """
    ordered = sorted(loads)
    seconds = done = 0.0
    for index, load in enumerate(ordered):
        seconds += (load - done) * hardware.slower(len(ordered) - index)
        done = load
    return seconds
