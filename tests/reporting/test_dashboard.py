"""The live view's lines: from records as `metrics.jsonl` has them, at any size of terminal."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from kfac_dist.reporting.dashboard import MOST_ROWS, Dashboard, History, sparkline
from kfac_dist.reporting.progress import Status

STEPS = 300


def record(step: int, **values: Any) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step // 50,
        "loss": 40.0 / step,
        "lr": 0.1,
        "samples_per_second": 7500.0,
        "seconds": 0.02 * step,
        "skipped": 0,
        "kfac/damping": 0.03,
        "kfac/kl_scale": 0.5,
        "kfac/failed_inversions": 0,
        "kfac/seconds/inversion": 0.005 * step,
        "kfac/seconds/sharing": 0.001 * step,
        **values,
    }


def history(*records: dict[str, Any], saved: float | None = 1000.0) -> History:
    found = History("digits · kfac", STEPS, 0, 2, lambda: saved, began=0.0)
    for values in records:
        found.add(Status.of(values), values["seconds"])
    return found


def shown(of: History, width: int = 110, height: int = 40, now: float = 4.0, *, ascii_only: bool = False) -> list[str]:
    return [line.plain for line in Dashboard(of, now, wall=1012.0).lines(width, height, ascii_only=ascii_only)]


def test_a_view_says_how_the_run_stands() -> None:
    run = history(*(record(step) for step in range(10, 210, 10)))
    run.evaluations.append((100, {"loss": 0.4, "accuracy": 0.97}))
    text = "\n".join(shown(run))
    for part in ("digits · kfac", "step 200 of 300", "epoch 4", " 66 %", "4 s so far, 2 s left", "0.2", "7,500"):
        assert part in text
    for part in ("KL clip", "0.03", "0 skipped steps · 2 restarts · checkpoint 12 s ago"):
        assert part in text
    assert "step 100: test loss 0.4, accuracy 0.97" in text


def test_phases_are_milliseconds_of_the_recent_steps_and_bars_are_to_scale() -> None:
    slow = [record(step, **{"kfac/seconds/inversion": 100.0 + 0.005 * step}) for step in range(10, 310, 10)]
    lines = shown(history(record(1), *slow), width=60)
    bars = {line.split()[0]: line for line in lines if "█" in line and ("." in line.split()[1])}
    assert "ms a step, rank 0, over the last 200 steps" in lines
    assert " 5.00 " in bars["inversion"]  # not the hundred seconds before
    assert " 1.00 " in bars["sharing"]
    assert " 14.00 " in next(line for line in lines if line.startswith("the rest"))
    inversion, sharing = (bars[name].count("█") for name in ("inversion", "sharing"))
    assert inversion / sharing == pytest.approx(5, abs=1.3)


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize(
    ("width", "height"), [(200, 50), (110, 30), (96, 12), (80, 24), (60, 20), (60, 6), (20, 9), (5, 3)]
)
def test_no_view_is_larger_than_its_terminal(width: int, height: int, ascii_only: bool) -> None:
    run = history(*(record(step, skipped=1) for step in range(1, 120)))
    run.went_back = 1
    run.evaluations.extend((step, {"loss": 0.4, "accuracy": 0.97}) for step in range(5))
    lines = shown(run, width, height, now=500.0, ascii_only=ascii_only)
    assert 0 < len(lines) <= height
    assert max(map(cell_len, lines)) <= width
    if width >= 60:
        assert any(line.startswith("loss") for line in lines)
    if height >= 20:
        assert any("119 skipped steps" in line for line in lines)


def test_a_terminal_without_unicode_is_shown_none() -> None:
    run = history(*(record(step) for step in range(1, 20)))
    run.title = "digits: kfac"
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=100, height=30)
    console.print(Dashboard(run, 1.0, 1.0))  # would raise UnicodeEncodeError


def test_a_game_shows_the_clip_of_both_players() -> None:
    values = record(1, **{"kfac/generator/kl_scale": 0.25, "kfac/discriminator/kl_scale": 0.75})
    del values["kfac/kl_scale"]
    lines = shown(history(values))
    assert [line.split()[:4] for line in lines if line.startswith("KL")] == [
        ["KL", "clip", "gen", "0.25"],
        ["KL", "clip", "dis", "0.75"],
    ]


def test_without_kfac_nothing_of_it_is_shown() -> None:
    plain = {name: value for name, value in record(1).items() if not name.startswith("kfac/")}
    text = "\n".join(shown(history(plain, plain, saved=None)))
    assert "KL clip" not in text
    assert "damping" not in text
    assert "ms a step" not in text
    assert "no checkpoint yet" in text


def test_before_the_first_step_and_without_a_loss() -> None:
    assert any(line.startswith("waiting for the first logged step") for line in shown(history()))
    skipped = record(10, skipped=10)
    del skipped["loss"]  # a window of skipped steps has none
    lines = shown(history(record(9), skipped))
    assert any(line.startswith("loss") and "nan" in line for line in lines)
    assert any("10 skipped steps" in line for line in lines)


def test_a_run_that_stands_still_is_called_so_and_one_that_is_over_is_not() -> None:
    run = history(*(record(step) for step in range(10, 210, 10)))
    assert not any("nothing logged" in line for line in shown(run, now=12.0))
    assert any("nothing logged for 56 s" in line for line in shown(run, now=60.0))
    over = history(*(record(step) for step in range(10, STEPS + 10, 10)))
    assert not any("nothing logged" in line for line in shown(over, now=60.0))


def test_going_back_forgets_what_came_later() -> None:
    run = history(*(record(step) for step in range(10, 110, 10)))
    run.evaluations.extend([(40, {"loss": 1.0}), (80, {"loss": 2.0})])
    run.go_back(50)
    assert [row.step for row in run.rows] == [10, 20, 30, 40, 50]
    assert [step for step, _ in run.evaluations] == [40]
    assert any("1 return to a checkpoint" in line for line in shown(run))


def test_long_runs_keep_few_rows_and_the_newest() -> None:
    run = history(*(record(step) for step in range(1, 5000)))
    assert len(run.rows) <= MOST_ROWS
    assert run.rows[-1].step == 4999
    assert run.rows[0].step < 50


def test_a_sparkline_goes_from_its_lowest_to_its_highest_value() -> None:
    assert sparkline([1.0, 10.0, 100.0], 3) == "▁▅█"  # positive: a logarithmic scale
    assert sparkline([-1.0, 0.0, 1.0], 3) == "▁▅█"
    assert sparkline([1.0, None, math.nan, math.inf, 2.0], 9) == "▁   █"
    assert sparkline([3.0] * 4, 9) == "▁▁▁▁"
    assert sparkline([0.03 * (1 + 1e-12), 0.03], 9) == "▁▁"
    assert sparkline(list(range(1, 1000)), 20)[::19] == "▁█"
    assert len(sparkline(list(range(1000)), 20)) == 20
    assert sparkline([], 9) == sparkline([1.0], 0) == ""
