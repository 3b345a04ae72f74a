"""The picture of the losses: there, legible without colour, and drawn without a display."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kfac_dist.errors import KFACError
from kfac_dist.reporting.curves import STYLES, Curve, draw_losses, smoothed


def _curve(name: str, length: int) -> Curve:
    return Curve(
        name, range(1, length + 1), [0.01 * step for step in range(length)], [1 / step for step in range(1, length + 1)]
    )


def test_the_picture_is_a_png_of_readable_size(tmp_path: Path) -> None:
    path = tmp_path / "loss.png"
    draw_losses([_curve("kfac", 400), _curve("sgd", 40), _curve("one point", 1), _curve("none", 0)], path, "digits")
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(header[start : start + 4]) for start in (16, 20))
    assert width > 1200
    assert height > 500
    assert "matplotlib.pyplot" not in sys.modules


def test_a_run_that_logged_nothing_has_an_empty_picture(tmp_path: Path) -> None:
    draw_losses([_curve("none", 0)], tmp_path / "loss.png", "digits")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_no_two_runs_look_alike_in_grey() -> None:
    assert len({repr((line, marker)) for _, line, marker in STYLES}) == len(STYLES)


def test_smoothing_is_a_trailing_mean() -> None:
    assert smoothed([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
    assert smoothed([1.0, 3.0], 1) == [1.0, 3.0]


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(KFACError, match=r"kfac_dist\[train\]"):
        draw_losses([_curve("kfac", 3)], tmp_path / "loss.png", "digits")
