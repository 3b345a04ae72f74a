"""Which strategies are compared: the best ways to share the work, crossed with what else can vary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from kfac_dist.config.yaml.load import load_config
from kfac_dist.config.yaml.options import parse_kfac
from kfac_dist.curvature.blocks import find_blocks
from kfac_dist.planning import comparison
from kfac_dist.planning.comparison import Comparison
from kfac_dist.planning.machines.hardware import load_hardware
from kfac_dist.planning.strategies import AXES, changed, crossed, distributions
from kfac_dist.planning.table import view
from kfac_dist.tasks import build_model

BYTE_GPT = Path(__file__).parents[2] / "configs" / "byte_gpt.yaml"
GPT = ("model.args={layers: 1, width: 1024, heads: 16, context: 256}", "data.args.context=256", "train.batch_size=256")
SPREAD = ("kfac.inversion.inverse_every=100", "kfac.inversion.stagger=10", "kfac.inversion.max_factor_dim=2048")


def compared(size: int, *overrides: str, hardware: str = "a100-ib200") -> Comparison:
    config = load_config(BYTE_GPT, [*GPT, *overrides])
    with torch.device("meta"):
        model = build_model(config.model)
    [found] = comparison.compare(config, model, load_hardware(hardware), [size], 8)
    return found


def test_another_placement_with_smaller_factors_is_found() -> None:
    # Each alone gains less: the placement on what is preconditioned, the size on what is inverted and sent.
    found = compared(64).quicker
    assert found is not None
    assert found.strategy.changes["distribution"]["placement"] in {"owner", "node"}
    assert found.strategy.changes["inversion"]["max_factor_dim"] == 2048


@pytest.mark.parametrize(
    ("size", "hardware", "overrides"),
    [
        (8, "a100-ethernet100", ()),
        (8, "h100-ib400", SPREAD),
        (8, "a100-ib200", ("engine.name=fsdp2", *SPREAD[:2])),
        (64, "h100-ib400", ()),
    ],
)
def test_the_best_of_the_whole_grid_is_found(
    size: int, hardware: str, overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = compared(size, *overrides, hardware=hardware)
    monkeypatch.setattr(comparison, "QUICKEST", 1_000)
    whole = compared(size, *overrides, hardware=hardware)
    assert len(whole.predictions) > 3 * len(found.predictions)
    assert found.best.seconds == whole.best.seconds
    assert found.quicker is not None
    assert whole.quicker is not None
    assert found.quicker.seconds == whole.quicker.seconds


def test_the_table_is_short_and_has_what_is_named() -> None:
    found = compared(64, *SPREAD)
    console = Console(width=250)
    with console.capture() as capture:
        console.print(view([found]))
    text = capture.get()
    lines = text[text.index("strategy") : text.index(" other strategies")].splitlines()
    rows = [line for line in lines if line.strip().endswith("M")]
    assert len(rows) <= 2 * 6 + 3 < len(found.predictions)
    assert found.quicker is not None
    named = comparison.words(found.quicker.strategy)
    assert named in text[text.index(" other strategies") :]  # the line below, in full
    [shared] = [line for line in text.splitlines() if line.startswith("Every row")]
    row = next(line for line in rows if "(other steps)" in line)  # the quickest comes first
    assert all(change in row or change in shared for change in named.split(", "))
    assert f"{len(found.predictions) - len(rows)} other strategies are slower" in text


def test_changes_are_told_from_what_is_configured() -> None:
    config = parse_kfac({"inversion": {"inverse_every": 20, "max_factor_dim": 64}})
    with torch.device("meta"):
        blocks = find_blocks(torch.nn.Linear(3000, 2000), config.curvature).blocks
    grid = distributions(config, world_size=4, node_size=2, sharded=False)
    assert grid[0].configured
    everything = list(grid)
    for axis in AXES:
        everything += crossed(config, everything, axis, blocks)
    assert len({repr(strategy.config) for strategy in everything}) == len(everything)
    for strategy in everything:
        assert changed(config, strategy.changes) == strategy.config
        kept = {"curvature", "inversion"} & set(strategy.changes)
        assert strategy.same_mathematics == (not kept or set(strategy.changes["inversion"]) == {"stagger"})
