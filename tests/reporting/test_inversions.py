"""Charts of who inverted what: by refresh, by rank, and true where refreshes take turns."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from kfac_dist.reporting.report import read_run
from tests.reporting.large_run import write_large_run

pytest.importorskip("plotly", reason="plotly is not installed: pip install 'kfac_dist[report]'")
from kfac_dist.reporting.report import inversions  # needs plotly


def test_a_cell_says_which_rank_inverted_a_factor_and_for_how_long(tmp_path: Path) -> None:
    [run] = read_run(write_large_run(tmp_path, depth=3, ranks=3, refreshes=4))
    [cells] = inversions.timeline(run).data
    assert list(cells.x) == ["0", "10", "20", "30"]
    assert list(cells.y[:4]) == ["layers.0.contract A", "layers.0.contract G", "layers.0.expand A", "layers.0.expand G"]
    assert [row[0] for row in cells.text[:4]] == ["0", "1", "1", "2"]
    assert cells.hovertext[0][1].startswith("layers.0.contract/A/0, 994×994: rank 0, ")
    assert cells.hovertext[0][1].endswith(" ms of its refresh at step 10, by n³")
    assert sum(row[0] for row in cells.z) == pytest.approx(10 + 20 + 30)


def test_many_are_cut_to_the_costliest_rows_and_the_last_refreshes(tmp_path: Path) -> None:
    [run] = read_run(write_large_run(tmp_path, refreshes=130))
    figure = inversions.timeline(run)
    [cells] = figure.data
    assert (len(cells.y), len(cells.x)) == (40, 120)
    assert cells.y[0] == "layers.0.contract A"
    assert cells.y[-1] == "layers.4.qkv G"
    assert figure.layout.xaxis.title.text == (
        "step of the refresh; the 40 costliest of 240 rows; the last 120 of 130 refreshes"
    )


def test_where_refreshes_take_turns_a_layer_is_empty_at_those_of_others(tmp_path: Path) -> None:
    [run] = read_run(write_large_run(tmp_path, depth=1, ranks=2, refreshes=2, slots=2))
    [cells] = inversions.timeline(run).data
    assert dict(zip(cells.y, map(list, cells.text), strict=True))["layers.0.qkv G"] == ["1", "", "1", ""]
    assert dict(zip(cells.y, map(list, cells.z), strict=True))["layers.0.projection A"][::2] == [None, None]


def test_several_ranks_of_a_cut_factor_share_a_cell(tmp_path: Path) -> None:
    [run] = read_run(write_large_run(tmp_path, depth=1, ranks=8, refreshes=1))
    for reading in run.readings:
        for factor in reading["factors"]:
            factor["block"], factor["side"] = "attention", "A"
    [cells] = inversions.timeline(run).data
    assert cells.text[0][0] == "0,1,…"
    assert cells.hovertext[0][0].count("rank") == 8


@pytest.mark.parametrize(
    ("slots", "title"),
    [
        (1, "milliseconds, refresh at step 190"),
        (3, "milliseconds, each factor's last refresh, steps 190 to 192"),
    ],
)
def test_bars_say_of_which_refresh_they_are(tmp_path: Path, slots: int, title: str) -> None:
    [run] = read_run(write_large_run(tmp_path, slots=slots))
    figure = inversions.bars(run)
    assert figure.layout.xaxis.title.text == title
    whole = sum(sum(part.x) for part in figure.data)
    assert whole == pytest.approx(slots * sum(range(10, 81, 10)))


def test_segments_differ_from_their_neighbours_without_colour(tmp_path: Path) -> None:
    [run] = read_run(write_large_run(tmp_path, ranks=4))
    *parts, rest = inversions.bars(run).data
    assert len(parts) == 30
    assert all(len(part.y) == 4 for part in parts)
    assert all(one.marker.pattern.shape != other.marker.pattern.shape for one, other in pairwise(parts))
    assert list(rest.text) == ["30 smaller"] * 4


def test_of_many_ranks_the_slowest_stand_out(tmp_path: Path) -> None:
    [run] = read_run(write_large_run(tmp_path, ranks=24, refreshes=2))
    figure = inversions.times(run)
    assert [curve.name for curve in figure.data[3:6]] == ["rank 23", "rank 22", "rank 21"]
    assert len(figure.data) == 14
