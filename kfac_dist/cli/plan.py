"""`kfac-dist plan` and `kfac-dist calibrate`: a run's predicted costs, and a machine's measured rates."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kfac_dist.cli.configuration import ConfigFile, Overrides, load, model_of_shapes
from kfac_dist.cli.exits import exit_codes
from kfac_dist.config.schema import Config, Target
from kfac_dist.config.yaml.document import show
from kfac_dist.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from kfac_dist.curvature.blocks import Block
    from kfac_dist.planning.memory_options import MicroRows

CALIBRATION_SECONDS = 600.0
PIPE_WIDTH = 160
# Of a plan that is to be read; the largest clusters have fewer GPUs.
MOST_RANKS = 100_000
# Hardware profile of comparisons unless another one is named.
HARDWARE = "h100-ib400"


class Device(StrEnum):
    """The device that computes."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    world_size: Annotated[
        str, typer.Option(metavar="W[,W…]", help="Ranks that share the work; several compare strategies on each.")
    ] = "2",
    node_size: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_RANKS, help="Ranks of one node; all of them, or the hardware's, by default."),
    ] = None,
    strategies: Annotated[
        bool, typer.Option("--strategies", help="Compare strategies on one number of ranks.")
    ] = False,
    hardware: Annotated[
        str | None,
        typer.Option(help="Compare strategies on this: a profile such as h100-ib400, or a file of `calibrate`."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Show every block and every rank of a large plan, or every strategy.")
    ] = False,
) -> None:
    """Show the rank that inverts and preconditions each block, and the costs of strategies, from shapes alone.

    One number of ranks shows the plan: by block and rank if it is small or with --all, else a summary. Several numbers,
    --strategies or --hardware show a table of strategies: bytes, flops, balance, memory and predicted milliseconds, and
    the best one as YAML. Builds the model: code that the configuration names is called.
    """
    with exit_codes():
        sizes = _world_sizes(world_size)
        resolved = load(config, overrides, {})
        from rich.console import Console

        console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
        if strategies or hardware is not None or len(sizes) > 1:
            from kfac_dist.planning.comparison import compare
            from kfac_dist.planning.machines.hardware import load_hardware
            from kfac_dist.planning.table import view

            machine = load_hardware(hardware or HARDWARE)
            model = model_of_shapes(resolved.model).to("meta")
            compared = compare(resolved, model, machine, sizes, node_size or machine.node_size)
            console.print(view(compared, everything=everything))
            return
        _show_plan(resolved, sizes[0], node_size, console, everything=everything)


def calibrate(
    out: Annotated[Path, typer.Option(help="The file to write, for `plan --hardware FILE`.")] = Path("measured.json"),
    device: Annotated[Device, typer.Option(help="Device of the measurements.")] = Device.AUTO,
    name: Annotated[str | None, typer.Option(help="Name in tables; the file's name by default.")] = None,
) -> None:
    """Measure this machine's products, inversions and, under a launcher, its collectives, for `plan`."""
    with exit_codes():
        from kfac_dist.distributed.communicators.build import build_communicator
        from kfac_dist.distributed.startup.bootstrap import bootstrap
        from kfac_dist.planning.machines.calibration import calibrate as measure
        from kfac_dist.planning.machines.calibration import write

        with bootstrap(device.value, CALIBRATION_SECONDS) as world:
            communicator = build_communicator(CALIBRATION_SECONDS)
            measured = measure(world, communicator, name=name or out.stem)
            communicator.close()
            if world.rank == 0:
                write(measured, out)
                print(f"measured on {world.describe()}: {out}")


def _world_sizes(text: str) -> list[int]:
    found = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 9 and 0 < int(part) <= MOST_RANKS for part in found):
        raise ConfigError(
            f"--world-size: found {show(text)}, expected numbers of ranks from 1 on, such as 8 or 8,64,512; at most "
            f"{MOST_RANKS:,}"
        )
    return list(dict.fromkeys(int(part) for part in found))


def _show_plan(resolved: Config, world_size: int, node_size: int | None, console: Console, *, everything: bool) -> None:
    from kfac_dist.config.schema import LossTerms, Precision
    from kfac_dist.curvature.block_tridiagonal_units import find_all
    from kfac_dist.planning.memory_options import MicroRows, savings
    from kfac_dist.planning.plan_table import is_small, plan_summary, plan_view
    from kfac_dist.precision import settled
    from kfac_dist.preconditioner.memory import check_class_memory, rank_bytes
    from kfac_dist.preconditioner.plan import build_plan

    model = model_of_shapes(resolved.model)
    coverage = find_all(model, resolved.kfac)
    config = settled(resolved.kfac, (p for block in coverage.blocks for p in block.parameters.values()))
    shards = resolved.engine.shard_size(world_size)
    planned = build_plan(
        coverage.blocks,
        config,
        world_size=world_size,
        local_world_size=node_size or world_size,
        shard_size=shards,
    )
    check_class_memory(planned, config)
    kept = rank_bytes(planned, config, sharded=shards > 1)
    half = resolved.engine.precision is not Precision.FLOAT32
    micro = MicroRows({}, half, resolved.loss.name.loss_terms is LossTerms.TOKEN)
    samples = -(-resolved.train.batch_size // (world_size * resolved.train.accumulate))
    options = savings(
        coverage.blocks,
        config,
        world_size=world_size,
        local_world_size=node_size or world_size,
        shard_size=shards,
        micro=_micro_rows(model, coverage.blocks, resolved.data, micro, samples),
    )
    treatment = resolved.kfac.curvature.uncovered
    if everything or is_small(planned):
        console.print(plan_view(planned, kept, coverage.uncovered, treatment, options))
    else:
        for line in plan_summary(planned, kept, coverage.uncovered, treatment, options):
            console.print(line, soft_wrap=True)


def _micro_rows(model: nn.Module, blocks: Sequence[Block], data: Target, micro: MicroRows, samples: int) -> MicroRows:
    """Fill in the rows of a micro-batch of so many samples; they are counted only where measuring copies any."""
    from kfac_dist.planning.rows import count_rows

    if not micro.copied:
        return micro
    rows, _ = count_rows(model.to("meta"), blocks, data)
    return replace(micro, rows={name: samples * count for name, count in rows.items()})
