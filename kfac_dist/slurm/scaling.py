"""Scaling studies: the runs of `slurm/scaling.sbatch`, and the table of their times.

    python -m kfac_dist.slurm.scaling plan --nodes "1 2 4" CONFIG [KEY=VALUE]...      a line a run: name, nodes, batch
    python -m kfac_dist.slurm.scaling table DIRECTORY

Strong scaling divides the same batch among more nodes: n nodes are ideally n times as quick. Weak scaling gives each
node the same batch: ideally a step takes as long on n nodes as on one.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kfac_dist.config.yaml.load import load_config
from kfac_dist.errors import ConfigError, KFACError

_NAME = re.compile(r"(both|strong|weak)-(\d+)")


@dataclass(frozen=True)
class ScalingRun:
    """One run of a study.

    Attributes:
        kind: `strong`, `weak`, or `both` on the fewest nodes, where they are the same.
        nodes: Nodes that it gets.
        batch: Samples of a step.
    """

    kind: str
    nodes: int
    batch: int

    @property
    def name(self) -> str:
        """Name of its directory."""
        return f"{self.kind}-{self.nodes}"


@dataclass(frozen=True)
class Timing:
    """The time of a run.

    Attributes:
        run: Name of the run.
        seconds: A step, without the first logged ones.
    """

    run: ScalingRun
    seconds: float


def plan(batch: int, nodes: Sequence[int]) -> list[ScalingRun]:
    """Return the runs of a study, in the order of their nodes.

    Args:
        batch: Samples of a step, as configured, for the fewest nodes.
        nodes: Numbers of nodes.

    Raises:
        ConfigError: There are none, or not all are positive.
    """
    counts = sorted(set(nodes))
    if not counts or counts[0] < 1:
        raise ConfigError(f"--nodes: found {list(nodes)}, expected numbers of nodes such as '1 2 4'")
    least = counts[0]
    runs = [ScalingRun("both", least, batch)]
    for count in counts[1:]:
        runs += [ScalingRun("strong", count, batch), ScalingRun("weak", count, batch * count // least)]
    return runs


def read_timings(directory: Path) -> list[Timing]:
    """Return the times of a study's runs.

    Raises:
        KFACError: A run is missing or has too few logged steps.
    """
    found = [path for path in directory.glob("*-*") if _NAME.fullmatch(path.name)]
    if not any(path.name.startswith("both-") for path in found):
        raise KFACError(f"{directory}: holds no scaling study (expected both-1 and others beside it)")
    return sorted((_timing(path) for path in found), key=lambda timing: (timing.run.nodes, timing.run.kind))


def table(timings: Sequence[Timing]) -> str:
    """Return a study's table in Markdown: speed against the fewest nodes, and how much of the ideal that is."""
    base = next(timing for timing in timings if timing.run.kind == "both")
    lines = [
        "| scaling | nodes | batch | ms/step | samples/s | efficiency |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for kind in ("strong", "weak"):
        for timing in timings:
            run = timing.run
            if run.kind not in (kind, "both"):
                continue
            speed = run.batch / timing.seconds
            efficiency = speed * base.run.nodes / (base.run.batch / base.seconds * run.nodes)
            cells = (kind, run.nodes, run.batch, f"{1000 * timing.seconds:.2f}", f"{speed:,.0f}", f"{efficiency:.2f}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(prog="python -m kfac_dist.slurm.scaling", description="Plan and show a study.")
    commands = parser.add_subparsers(dest="command", required=True)
    planning = commands.add_parser("plan", help="print a line for each run: name, nodes, batch")
    planning.add_argument("--nodes", required=True, help="numbers of nodes, such as '1 2 4'")
    planning.add_argument("config", type=Path)
    planning.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    showing = commands.add_parser("table", help="print the times of the runs")
    showing.add_argument("directory", type=Path)
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "plan":
            batch = load_config(chosen.config, chosen.overrides).train.batch_size
            for run in plan(batch, _numbers(chosen.nodes)):
                print(run.name, run.nodes, run.batch)
        else:
            print(table(read_timings(chosen.directory)))
    except KFACError as error:
        sys.exit(f"error: {error}")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split()]
    except ValueError:
        raise ConfigError(f"--nodes: found {text!r}, expected numbers of nodes such as '1 2 4'") from None


def _timing(path: Path) -> Timing:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    try:
        batch = int(yaml.safe_load((path / "config.yaml").read_text())["train"]["batch_size"])
        records: list[dict[str, Any]] = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        first, *_, last = (record for record in records if "loss" in record)
        seconds = (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise KFACError(f"{path}: not a finished run of at least two logged steps: {error}") from error
    return Timing(ScalingRun(match[1], int(match[2]), batch), seconds)


if __name__ == "__main__":
    main(sys.argv[1:])
