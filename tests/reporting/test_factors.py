"""Charts of hundreds of factors: those that stand out, a band of all, and a menu for the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from kfac_dist.reporting.report import read_run
from tests.reporting.large_run import write_large_run

pytest.importorskip("plotly", reason="plotly is not installed: pip install 'kfac_dist[report]'")
from kfac_dist.reporting.report import factors  # need plotly
from kfac_dist.reporting.report.chart_style import style
from kfac_dist.reporting.report.many_curves import draw_many


def test_of_many_factors_the_worst_stand_out_from_a_band(tmp_path: Path) -> None:
    [run] = read_run(write_large_run(tmp_path))
    smallest, largest, middle, *drawn, chosen = factors.conditions(run).data
    assert (smallest.y[0], largest.y[0], middle.y[0]) == (10, 249, 129.5)
    assert largest.fill == "tonexty"
    assert [curve.y[0] for curve in drawn] == [249, 248, 247, 246, 245, 244, 243, 242, 241, 240]
    assert not chosen.visible
    choices = dict(factors.conditions(run).layout.meta["choices"])
    assert len(choices) == 231
    assert choices["layers.0.qkv/A/0"] == {
        "x": [list(range(0, 200, 10))],
        "y": [[10.0] * 20],
        "name": ["layers.0.qkv/A/0"],
        "visible": [True],
    }


def test_a_menu_puts_any_factor_into_the_same_few_curves(tmp_path: Path) -> None:
    [run] = read_run(write_large_run(tmp_path))
    figure = factors.spectra(run)
    assert len(figure.data) == 6
    names = [name for name, _ in figure.layout.meta["choices"]]
    assert len(names) == 240
    assert names.index("layers.2.qkv/A/0") < names.index("layers.10.qkv/A/0")
    first = figure.layout.meta["choices"][0][1]
    assert [list(curve.y) for curve in figure.data] == [list(values) for values in first["y"]]


def test_of_many_blocks_those_farthest_from_an_even_split_are_drawn(tmp_path: Path) -> None:
    [run] = read_run(write_large_run(tmp_path))
    drawn = factors.splits(run).data[3:-1]
    assert [curve.y[0] for curve in drawn] == pytest.approx([1 + index / 200 for index in range(238, 218, -2)])


def test_few_curves_are_all_drawn() -> None:
    figure = draw_many({str(index): ([0], [1.0]) for index in range(12)}, max, "factors")
    assert [curve.name for curve in figure.data] == [str(index) for index in range(12)]
    assert figure.layout.meta is None


def test_a_band_knows_what_was_read_before_and_nothing_infinite() -> None:
    """Where refreshes take turns, a step has readings of some factors alone."""
    turns = {str(index): ([index % 2, 2 + index % 2], [float(index), 100.0 + index]) for index in range(20)}
    turns["19"] = ([1, 3], [None, 119.0])
    smallest, largest, *_ = draw_many(turns, lambda values: values[1] or 0.0, "factors").data
    assert list(smallest.x) == [0, 1, 2, 3]
    assert list(smallest.y) == [0, 0, 1, 100]
    assert list(largest.y) == [18, 18, 118, 119]


def test_neighbours_differ_by_more_than_colour() -> None:
    for points in (10, 1000):
        looks = [style(index, points) for index in range(13)]
        assert all("markers" in look["mode"] for look in looks)
        assert len({(look["line"]["dash"], look["marker"]["symbol"]) for look in looks}) == 13
