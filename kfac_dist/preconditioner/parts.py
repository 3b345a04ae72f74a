"""Construction of the parts that `KFAC.step` drives, from a configuration and an engine: the plan, then this rank's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from kfac_dist.config.schema import Direction, KFACConfig, Placement, Structure, Uncovered
from kfac_dist.curvature.block_tridiagonal_units import ChainGroup
from kfac_dist.curvature.blocks import Block, Coverage
from kfac_dist.curvature.capture.arbiter import Arbiter
from kfac_dist.curvature.factors import Unit
from kfac_dist.curvature.inverses.offload import GROUP_BYTES, Offload
from kfac_dist.curvature.inverses.payloads import Payloads
from kfac_dist.curvature.inverses.precondition import Group, build_groups
from kfac_dist.curvature.statistics import RunningAverages
from kfac_dist.distributed.communicators.agreement import agree_on_plan
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.engines import Engine
from kfac_dist.errors import ConfigError, ModelError
from kfac_dist.precision import torch_dtype, working
from kfac_dist.preconditioner.invert.block_tridiagonal import ChainRefresh
from kfac_dist.preconditioner.invert.damping import Damping
from kfac_dist.preconditioner.invert.damping_rules import DampingAdaptation
from kfac_dist.preconditioner.invert.ekfac import SecondMoments
from kfac_dist.preconditioner.invert.refresh import Refresh
from kfac_dist.preconditioner.invert.refresh_queue import RefreshQueue
from kfac_dist.preconditioner.measure.loss_terms import TermCounter
from kfac_dist.preconditioner.measure.measurement import Measurement
from kfac_dist.preconditioner.measure.sampled_gradients import SampledLabelGradients
from kfac_dist.preconditioner.memory import check_class_memory, keeps_own_factors_only
from kfac_dist.preconditioner.phases import PhaseTimer
from kfac_dist.preconditioner.plan import Plan, build_plan, exchange_buckets
from kfac_dist.preconditioner.precondition.diagonal_fisher import DiagonalFisher
from kfac_dist.preconditioner.precondition.first_order import FirstOrder, check_plain_descent
from kfac_dist.preconditioner.precondition.preconditioner import Preconditioner
from kfac_dist.preconditioner.precondition.transforms.table import build_transforms
from kfac_dist.preconditioner.precondition.transforms.trust_region import HasRates, TrustRegion
from kfac_dist.preconditioner.precondition.transport import ReplicatedTransport, ShardedTransport, Transport
from kfac_dist.preconditioner.precondition.uncovered import UncoveredGradients
from kfac_dist.preconditioner.reduce.reduction import FactorReduction

# Parameters whose reason is shown when none has a block.
_REASONS = 5


@dataclass(frozen=True)
class Loop:
    """The training loop's own things that K-FAC reads.

    Attributes:
        optimizer: Has the learning rates, if K-FAC was given one.
        scaler: The AMP scaler, if one is enabled.
        total_steps: Length of the run, for schedules that span it.
        check_scale: Whether the first measured step looks at the loss's scale.
    """

    optimizer: HasRates | None
    scaler: torch.amp.GradScaler | None
    total_steps: int | None
    check_scale: bool


@dataclass(frozen=True)
class Parts:
    """The parts of one K-FAC on this rank, for one set of blocks.

    Attributes:
        plan: The work of every rank.
        communicator: All ranks.
        averages: This rank's statistics.
        reduction: Adds the ranks' statistics up.
        measurement: From hooks to statistics.
        queue: The layers that the step measures and refreshes.
        groups: The blocks that this rank preconditions.
        offload: Keeps the groups' inverses on the host, if it is asked for.
        uncovered: The gradients of parameters that have no block, and what becomes of them.
        refresh: Keeps the groups' inverses up to date.
        moments: EKFAC's second moments, if there are any.
        transport: Moves gradients to the groups and back.
        preconditioner: Gradients to updates, through the list of transforms; of parameters without a block, too.
        trust_region: The last of the transforms, if it is on; what it says of the last step is logged.
        damping: λ.
        mismatched: Why blocks were left out during the run, by name.
    """

    plan: Plan
    communicator: Communicator
    averages: RunningAverages
    reduction: FactorReduction
    measurement: Measurement
    queue: RefreshQueue
    groups: Sequence[Group]
    offload: Offload | None
    uncovered: UncoveredGradients
    refresh: Refresh
    moments: SecondMoments | None
    transport: Transport
    preconditioner: Preconditioner
    trust_region: TrustRegion
    damping: Damping
    mismatched: Mapping[str, str]

    @property
    def lagged(self) -> bool:
        """Whether new inverses are used some steps after their refresh."""
        return self.queue.schedule.lag > 0

    def owns(self, unit: Unit) -> bool:
        """Whether this rank inverts the unit."""
        return self.plan.assignment.owners[unit.name] == self.communicator.rank


def make_plan(
    engine: Engine, blocks: Sequence[Block], config: KFACConfig, comm: Communicator, device: torch.device
) -> Plan:
    """Plan the work of all ranks, and compare the plans; collective.

    Raises:
        ConfigError: The placement doesn't fit the number of ranks, or the engine's shards; or statistics by class don't
            fit the configured limit.
        PlanMismatchError: The ranks were given different models or configurations.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    together = f"{local} ranks a node" if config.distribution.placement is Placement.NODE else ""
    agree_on_plan(comm, [("configuration", f"{config!r} {together}")])
    plan = build_plan(
        blocks,
        config,
        world_size=comm.size,
        local_world_size=local,
        shard_size=engine.shard_size(comm.size),
    )
    agree_on_plan(comm, plan.rows())
    check_class_memory(plan, config)
    return plan


def assemble(
    engine: Engine,
    coverage: Coverage,
    config: KFACConfig,
    loop: Loop,
    comm: Communicator,
    plan: Plan,
    device: torch.device,
    *,
    queue: RefreshQueue,
    phases: PhaseTimer,
    counter: TermCounter,
    arbiter: Arbiter,
) -> Parts:
    """Build this rank's parts of the plan; collective, because ranks are split into rows and columns.

    Args:
        engine: The model.
        coverage: Its blocks.
        config: The configuration, with every precision settled.
        loop: Objects of the training loop.
        comm: All ranks.
        plan: The work of every rank.
        device: The blocks' device.
        queue: The layers that steps measure and refresh.
        phases: Records the time of measuring.
        counter: Counts the loss's terms, through changes of the model.
        arbiter: Compares captured rows with the blocks' gradients.

    Raises:
        ConfigError: The engine lacks the gradients that `uncovered` needs.
    """
    distribution, curvature, precision = config.distribution, config.curvature, working(config)
    uncovered = _uncovered(engine, coverage, config)
    sampled = _sampled(engine, uncovered, device, precision) if curvature.uncovered.draws and uncovered else None
    lean = keeps_own_factors_only(config, comm.size)
    averages = RunningAverages(
        plan.units,
        plan.owned(comm.rank) if lean else plan.units,
        decay=curvature.decay,
        device=device,
        dtype=torch_dtype(curvature.factor_dtype),
        working=precision,
        transient_window=lean,
    )
    row = _split(comm, plan.grid.rows())
    columns = exchange_buckets(plan, distribution.buckets if engine.sharded else 1)
    buckets = [
        _groups_of(coverage.blocks, names, plan, config, device) for names in columns[plan.grid.column_of(comm.rank)]
    ]
    groups = [group for bucket in buckets for group in bucket]
    offload = Offload(groups, device) if config.inversion.offload else None
    column = _split(comm, plan.grid.worker_groups())
    holders: dict[str, Payloads] = {unit.name: group for group in groups for unit in group.units}
    moments: SecondMoments | None = None
    if any(block.moments is not None for block in plan.blocks.values()):
        holders |= _bases_elsewhere(coverage.blocks, plan, holders, config, device)
        moments = SecondMoments(plan, holders, column, comm, config, device)
    kind = ChainRefresh if config.inversion.structure is Structure.BLOCK_TRIDIAGONAL else Refresh
    refresh = kind(
        averages,
        plan,
        holders,
        column if moments is None else comm,
        comm.rank,
        config.inversion.solver,
        pack=distribution.pack_triangles,
        moments=moments,
    )
    transport: Transport
    if engine.sharded:
        names = [[name for part in bucket for name in part] for bucket in zip(*columns, strict=True)]
        transport = ShardedTransport(engine, coverage.blocks, buckets, names, plan, row, device, precision)
    else:
        transport = ReplicatedTransport(coverage.blocks, groups, plan, row, precision)
    others: UncoveredGradients
    if config.update.direction is Direction.ORTHOGONAL:
        check_plain_descent(loop.optimizer)
        options = config.update.first_order_options
        others = FirstOrder(options, engine, uncovered, row=row, device=device, dtype=precision)
    else:
        others = DiagonalFisher(
            engine,
            uncovered,
            sampled=sampled,
            decay=curvature.decay,
            communicator=comm,
            row=row,
            device=device,
            dtype=precision,
        )
    reduction = FactorReduction(averages, plan, comm, distribution)
    adaptation = DampingAdaptation(config.inversion.adapt, comm, device, precision)
    trust_region = TrustRegion(config.update, loop.optimizer, device, precision)
    preconditioner = Preconditioner(
        transport,
        others,
        offload,
        build_transforms(config, trust_region),
        groups,
        engine=engine,
        communicator=comm,
        row=row,
        plain=[name for name in coverage.uncovered if name not in others.names],
        decays=_decays(coverage, uncovered, config),
    )
    return Parts(
        plan=plan,
        communicator=comm,
        averages=averages,
        reduction=reduction,
        measurement=Measurement(
            engine,
            coverage.blocks,
            averages,
            reduction,
            moments,
            curvature,
            communicator=comm,
            scaler=loop.scaler,
            phases=phases,
            sampled=others.sampled,
            check_scale=loop.check_scale,
            counter=counter,
            arbiter=arbiter,
        ),
        queue=queue,
        groups=groups,
        offload=offload,
        uncovered=others,
        refresh=refresh,
        moments=moments,
        transport=transport,
        preconditioner=preconditioner,
        trust_region=trust_region,
        damping=Damping(config.inversion.damping, adaptation, loop.total_steps, config.update.l2),
        mismatched=coverage.mismatched,
    )


def _uncovered(engine: Engine, coverage: Coverage, config: KFACConfig) -> list[str]:
    """Return the trained parameters without a block that get a step of their own: a diagonal Fisher's, or AdamW's.

    They are the same on every rank for any shards.
    """
    if config.curvature.uncovered is Uncovered.PLAIN and config.update.direction is Direction.NATURAL:
        return []
    trained = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    return [name for name in coverage.uncovered if name in trained]


def _decays(coverage: Coverage, uncovered: Sequence[str], config: KFACConfig) -> dict[str, float]:
    """Return the decoupled weight decay of each parameter that has one, as it joins an update."""
    if config.update.direction is Direction.NATURAL:
        return {}
    first_order = config.update.first_order_options
    matrices = dict.fromkeys(
        (name for block in coverage.blocks for name in block.parameters), config.update.orthogonal_options.weight_decay
    )
    others = dict.fromkeys(uncovered, first_order.lr_ratio * first_order.weight_decay)
    return {name: decay for name, decay in (matrices | others).items() if decay}


def _sampled(engine: Engine, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> SampledLabelGradients:
    if engine.sharded or engine.optimizer is not None:
        raise ConfigError(
            f"kfac.curvature.uncovered: diagonal_mc sends drawn labels back to whole parameters, which "
            f"{type(engine).__name__} doesn't have: use uncovered: diagonal"
        )
    return SampledLabelGradients(engine.module, names, device, dtype)


def _groups_of(
    blocks: Sequence[Block], names: Sequence[str], plan: Plan, config: KFACConfig, device: torch.device
) -> list[Group]:
    by_name = {block.name: block for block in blocks}
    units = {name: plan.blocks[name].units for name in names}
    inversion = config.inversion
    if inversion.structure is Structure.BLOCK_TRIDIAGONAL:
        chain = [block for block in blocks if block.name in units]
        return [ChainGroup(chain, [units[block.name] for block in chain], device, working(config))]
    dtype = torch_dtype(inversion.inverse_dtype)
    largest = GROUP_BYTES if inversion.offload else None
    chosen = [by_name[name] for name in names]
    return build_groups(chosen, units, inversion.solver, device, dtype, largest, working(config))


def _bases_elsewhere(
    blocks: Sequence[Block], plan: Plan, held: Mapping[str, Payloads], config: KFACConfig, device: torch.device
) -> dict[str, Payloads]:
    """Return room for the eigenbases, by unit name, of EKFAC's blocks that other columns precondition."""
    inversion, dtype = config.inversion, torch_dtype(config.inversion.inverse_dtype)
    found: dict[str, Payloads] = {}
    for block in blocks:
        own = plan.blocks[block.name]
        if own.moments is not None and own.units[0].name not in held:
            bases = Payloads([block], [own.units], inversion.solver, device, dtype, working(config))
            found |= dict.fromkeys((unit.name for unit in own.units), bases)
    return found


def _split(comm: Communicator, groups: tuple[tuple[int, ...], ...]) -> Communicator:
    """Return the communicator of this rank's group; the whole one when there is only one group."""
    return comm if len(groups) == 1 else comm.split(groups)


def device_of(coverage: Coverage) -> torch.device:
    """Return the device on which a model's blocks lie.

    Raises:
        ModelError: There is no block, or they lie on several devices.
    """
    if not coverage.blocks:
        reasons = [f"  {name}: {reason}" for name, reason in coverage.uncovered.items()]
        more = [f"  and {len(reasons) - _REASONS} more"] if len(reasons) > _REASONS else []
        raise ModelError(
            "\n".join(
                [
                    "no layer of the model gets a K-FAC block: check kfac.curvature.include and exclude, and that its "
                    "layers are of a covered type with trainable weights",
                    *reasons[:_REASONS],
                    *more,
                ]
            )
        )
    devices = {parameter.device for block in coverage.blocks for parameter in block.parameters.values()}
    if len(devices) > 1:
        raise ModelError(f"the model's layers lie on several devices ({', '.join(map(str, devices))}); K-FAC needs one")
    return devices.pop()
