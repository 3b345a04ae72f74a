"""The table that ends a run."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from kfac_dist.reporting.summary import RunSummary, result_table


def _shown(*rows: RunSummary) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100, force_terminal=True, color_system=None).print(result_table("title", rows))
    return stream.getvalue()


KFAC = RunSummary("kfac", 1000, 12.0, 1.5, 1.75, "accuracy", 0.987)
SGD = RunSummary("sgd", 1000, 4.0, 2.5, 1.65, "accuracy", 0.912)


def test_one_row_a_run_with_units() -> None:
    shown = _shown(KFAC, SGD)
    for text in ("test accuracy", "ms/step", "12.00", "4.00", "4.0 s", "12 s", "1,000", "0.987"):
        assert text in shown
    assert KFAC.milliseconds_per_step == 12
    assert RunSummary("none", 0, 0.0, None, None, "accuracy", None).milliseconds_per_step == 0


def test_the_best_losses_are_bold() -> None:
    table = result_table("title", [KFAC, SGD])
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["train loss"] == ["[bold]1.5[/bold]", "2.5"]
    assert columns["test loss"] == ["1.75", "[bold]1.65[/bold]"]


def test_the_main_score_has_a_column() -> None:
    scored = replace(KFAC, scores={"chrF": 31.25, "chrF de": 40.0})
    table = result_table("title", [SGD, scored])
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["chrF"] == ["–", "31.25"]
    assert "chrF de" not in columns
    assert "chrF" not in _shown(KFAC, SGD)


def test_a_diverged_run_says_so() -> None:
    shown = _shown(KFAC, RunSummary("sgd", 30, 0.1, None, None, "accuracy", None, note="diverged"))
    assert "diverged" in shown


def test_a_game_has_no_column_of_constants_and_fits_a_terminal() -> None:
    game = replace(
        KFAC, metric="classifier score", evaluated="Fréchet distance", references={"real_score": 9.7, "accuracy": 0.99}
    )
    stream = io.StringIO()
    Console(file=stream, width=80).print(result_table("title", [game]))
    assert "real" not in stream.getvalue()
    assert "…" not in stream.getvalue()
    assert max(len(line) for line in stream.getvalue().splitlines()) <= 80
