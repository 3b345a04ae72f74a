"""The checks in their order: each relies on the ones before it.

    environment ─ model, data ─ a trial pass ─ samples ─ blocks and plan ─ a mode to measure in ─ exact curvature
    ─ scale of the statistics
    ─ on request: the diagonal Fisher's estimators

A check that fails on one rank fails on all of them; the report is the same everywhere.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from kfac_dist.config.schema import Config, EngineName, Precision
from kfac_dist.curvature.block_tridiagonal_units import find_all
from kfac_dist.curvature.blocks import Coverage
from kfac_dist.distributed.communicators.agreement import agree_on_plan, agreed, plan_digest
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.distributed.communicators.build import build_communicator
from kfac_dist.distributed.startup.bootstrap import World, bootstrap
from kfac_dist.doctor.curvature import examine_curvature
from kfac_dist.doctor.findings import CurvatureRow, Finding, Report, Severity
from kfac_dist.doctor.fisher.examine import FisherRequest, examine_fisher
from kfac_dist.doctor.fisher.report import FisherReport
from kfac_dist.doctor.measure import Still, still_in_training
from kfac_dist.doctor.parameters import coverage_finding, parameter_rows
from kfac_dist.doctor.plans import examine_plan
from kfac_dist.doctor.samples import examine_samples
from kfac_dist.doctor.scale import examine_scale
from kfac_dist.engines import build_engine, check_sections
from kfac_dist.errors import CollectiveError, ConfigError, DataError, KFACError, ModelError
from kfac_dist.optimizers import build_optimizer
from kfac_dist.preconditioner.memory import check_class_memory
from kfac_dist.preconditioner.plan import Plan, build_plan
from kfac_dist.tasks import Loss, build_data, build_loss, build_model
from kfac_dist.training.checkpoints.random_state import seed_everything
from kfac_dist.training.data.batches import Source, Stream, source_of
from kfac_dist.training.data.sampler import Position, sampler_of
from kfac_dist.training.setup import RunParts, parameter_shapes, with_classes
from kfac_dist.training.trial import Trial, try_out, try_two_passes


@dataclass
class _Case:
    """Results of an examination so far."""

    config: Config
    world: World
    ranks: Communicator
    findings: list[Finding] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        return not any(finding.severity is Severity.ERROR for finding in self.findings)


def examine(config: Config, world_size: int | None = None, fisher: FisherRequest | None = None) -> Report:
    """Examine a run's configuration; called by every rank, which all return the same report.

    Args:
        config: The run, resolved (`kfac_dist.config.yaml.load.resolve`).
        world_size: Ranks to plan for; by default the present ones.
        fisher: Requests about the diagonal Fisher's estimators; none by default.

    Raises:
        ConfigError: The model or the data can't be built as named, or `world_size` contradicts the launcher.
        CollectiveError: The ranks did not meet, or lost each other.
    """
    with bootstrap(config.run.device, config.run.timeout_seconds) as world:
        planned = _planned_ranks(world, world_size)
        ranks = build_communicator(config.run.timeout_seconds)
        try:
            # A failure on one rank has another message there: all return rank 0's.
            report: Report = ranks.gather_objects(
                _examine(_Case(config, world, ranks), planned, fisher), label="report"
            )[0]
            return report
        finally:
            ranks.close()


def _planned_ranks(world: World, asked: int | None) -> int:
    if asked is not None and world.world_size not in (1, asked):
        raise ConfigError(
            f"--world-size {asked}, but {world.info.launcher} started {world.world_size} ranks: leave it out"
        )
    return asked or world.world_size


def _examine(case: _Case, planned: int, fisher: FisherRequest | None) -> Report:
    report = Report(case.config.run.name, _environment(case, planned))
    built = _build(case)
    if built is None:
        return replace(report, findings=tuple(case.findings))
    model, loss, train, test = built
    trial = _try_out(case, model, loss, train, test)
    _walk(case, loss, train, test, trial)
    coverage = find_all(model, case.config.kfac)
    trained = any(parameter.requires_grad for parameter in model.parameters())
    plan = _plan(case, coverage, planned, trial) if trained else None
    uncovered = case.config.kfac.curvature.uncovered
    rows = parameter_rows(model, coverage, plan, uncovered)
    report = replace(report, parameters=rows)
    if plan is not None:
        case.findings.append(coverage_finding(rows, uncovered))
        report = replace(report, plan_hash=plan_digest(plan.rows()), load=tuple(plan.assignment.load()))
        still = _mode(case, model, loss, train) if case.healthy and trial is not None else None
        if still is not None:
            report = replace(report, curvature=_measure(case, model, loss, train, test, still))
            if fisher is not None and case.healthy:
                report = replace(report, fisher=_measure_fisher(case, fisher, still))
    return replace(report, findings=tuple(case.findings))


def _environment(case: _Case, planned: int) -> dict[str, str]:
    import numpy

    from kfac_dist import __version__

    there = case.world.describe()
    return {
        "ranks": there if planned == case.world.world_size else f"{there}; planned for {planned}",
        "engine": str(case.config.engine.name),
        "kfac_dist": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def _build(case: _Case) -> tuple[nn.Module, Loss, Source, Source] | None:
    """Build model and data as training does; wrong names or arguments are errors of the configuration."""
    config = case.config
    try:
        with agreed(case.ranks):
            seed_everything(config.run.seed, rank=0)
            model = build_model(config.model).to(case.world.device)
            splits = build_data(config.data)
            train, test = (
                source_of(part, case.world.device, config.train.loader_workers) for part in (splits.train, splits.test)
            )
            sampler_of(config.train, len(train), config.run.seed).check(case.ranks.size, Position())
            if not len(test):
                raise DataError("the test data has no samples")
        agree_on_plan(case.ranks, parameter_shapes(model))
    except (ConfigError, CollectiveError):
        raise
    except KFACError as error:
        case.findings.append(Finding.of("data" if isinstance(error, DataError) else "model", error))
        return None
    return model, build_loss(config.loss), train, test


def _try_out(case: _Case, model: nn.Module, loss: Loss, train: Source, test: Source) -> Trial | None:
    try:
        with agreed(case.ranks):
            trial = try_out(model, loss, train, test)
    except CollectiveError:
        raise
    except KFACError as error:
        case.findings.append(Finding.of("forward", error))
        return None
    shape = tuple(trial.outputs.shape[1:])
    text = f"model and {case.config.loss.name} take the data; outputs {list(shape)} a sample"
    case.findings.append(Finding("forward", Severity.FINE, text))
    # Of any rank: the ranks have to go on together.
    unused = sorted({name for names in case.ranks.gather_objects(trial.unused, label="trial") for name in names})
    if unused:
        case.findings.append(_unused(case, unused))
    return trial


def _unused(case: _Case, names: list[str]) -> Finding:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    waits = case.config.engine.waits_for_every_gradient
    fatal = waits and case.ranks.size > 1
    said = f"the loss doesn't depend on {', '.join(names[:3])}{more}"
    if waits:
        said += (
            "; on several ranks DDP waits for their gradients: set engine.find_unused_parameters: true, or freeze them"
        )
    return Finding("gradients", Severity.ERROR if fatal else Severity.WARNING, said)


def _walk(case: _Case, loss: Loss, train: Source, test: Source, trial: Trial | None) -> None:
    outputs = None if trial is None else trial.outputs
    for what, data in (("training", train), ("test", test)):
        try:
            case.findings += examine_samples(what, data, loss, outputs, case.ranks)
        except CollectiveError:
            raise
        except KFACError as error:
            case.findings.append(Finding.of("data", error))


def _plan(case: _Case, coverage: Coverage, planned: int, trial: Trial | None) -> Plan | None:
    """Plan for `planned` ranks, and check that all ranks of this world plan the same."""
    config = case.config.kfac if trial is None else with_classes(case.config.kfac, trial.outputs.shape[-1])
    try:
        agree_on_plan(case.ranks, [(block.name, block.describe()) for block in coverage.blocks])
        if not coverage.blocks:
            raise ModelError(
                "no layer gets a K-FAC block, for the reasons in the table: check kfac.curvature.include and exclude, "
                "or train without K-FAC (kfac.enabled: false)"
            )
        local = case.world.local_world_size if planned == case.world.world_size else planned
        shards = case.config.engine.shard_size
        plan = build_plan(
            coverage.blocks, config, world_size=planned, local_world_size=local, shard_size=shards(planned)
        )
        agree_on_plan(case.ranks, [("configuration", repr(config)), *plan.rows()])
        if trial is not None:
            check_class_memory(plan, config)
    except CollectiveError:
        raise
    except KFACError as error:
        case.findings.append(Finding.of("plan", error))
        return None
    case.findings += examine_plan(coverage.blocks, config, plan, local, shards)
    return plan


def _mode(case: _Case, model: nn.Module, loss: Loss, train: Source) -> Still | None:
    """Return how to set the mode in which the model can be differentiated time and again; None if there is none."""
    refused = []
    for still in (nn.Module.eval, still_in_training):
        with agreed(case.ranks):
            why = try_two_passes(model, loss, train, still)
        # Of any rank: the ranks have to go on together.
        found = [own for own in case.ranks.gather_objects(why, label="modes") if own is not None]
        refused += found[:1]
        if not found and refused:
            text = (
                f"the model can't be differentiated in evaluation mode ({refused[0]}): what follows was measured in "
                "training mode, in which torch's own layers drop nothing and batch norms use their running statistics"
            )
            case.findings.append(Finding("evaluation", Severity.WARNING, text))
        if not found:
            return still
    text = (
        f"the first samples can't be passed through the model and back twice ({refused[-1]}): a second step would fail "
        "alike. Detach what the model keeps of one pass for the next"
    )
    case.findings.append(Finding("forward", Severity.ERROR, text))
    return None


def _measure(
    case: _Case, model: nn.Module, loss: Loss, train: Source, test: Source, still: Still
) -> tuple[CurvatureRow, ...]:
    """Run K-FAC's own measurements: on the bare model against the exact curvature, then the way that training goes."""
    config, ranks = case.config, case.ranks
    rows: tuple[CurvatureRow, ...] = ()
    try:
        findings, rows = examine_curvature(config.kfac, config.loss, model, loss, train, ranks, still)
        case.findings += findings
        check_sections(config.engine, config.train, on_cpu=case.world.device.type == "cpu")
        # Inputs and output gradients are whole under every engine, so that they can be measured under DDP, too.
        replicated = config.engine.model_copy(update={"name": EngineName.DDP, "precision": Precision.FLOAT32})
        engine, optimizer = build_engine(
            model, replicated, config.train, case.world, partial(build_optimizer, config=config.first_order)
        )
        sampler = sampler_of(config.train, len(train), config.run.seed)
        stream = Stream(train, sampler, rank=ranks.rank, world_size=ranks.size, accumulate=config.train.accumulate)
        parts = RunParts(engine, optimizer, None, loss, stream, train, test, 1, config.train, config.learning_rate)
        case.findings += examine_scale(config.kfac, config.loss.name.loss_terms, parts, config.run.seed, ranks, still)
    except CollectiveError:
        raise
    except KFACError as error:
        case.findings.append(Finding.of("measurement", error))
    return rows


def _measure_fisher(case: _Case, request: FisherRequest, still: Still) -> FisherReport | None:
    """Compare the diagonal Fisher's estimators; that a model doesn't allow it is nothing against the run."""
    try:
        return examine_fisher(case.config, case.world, case.ranks, request, still)
    except CollectiveError:
        raise
    except ModelError as error:
        case.findings.append(Finding("fisher", Severity.WARNING, str(error)))
    except KFACError as error:
        case.findings.append(Finding.of("fisher", error))
    return None
