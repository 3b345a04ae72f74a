"""The report fits a terminal of 80 columns and keeps every name whole."""

from __future__ import annotations

import pytest
from rich.console import Console

from kfac_dist.doctor.findings import CurvatureRow, Finding, ParameterRow, Report, Severity
from kfac_dist.doctor.view import print_report, report_view

REPORT = Report(
    name="run",
    environment={"ranks": "1 process on cpu", "engine": "ddp", "torch": "2.13"},
    parameters=(
        ParameterRow(
            "encoder.layers.0.attention.projection.weight",
            (128, 64, 3, 3),
            "float32",
            "encoder.layers.0.attention.projection",
            "Convolution",
            "A 577  G 128",
            "",
            1_400_000,
            1.9e8,
            (0, 1),
        ),
        ParameterRow("encoder.scale", (), "float32", reason="Encoder has no block"),
    ),
    findings=(
        Finding("data", Severity.FINE, "fine"),
        Finding("scale", Severity.WARNING, "a remark"),
        Finding("plan", Severity.ERROR, "[bold] is no markup"),
    ),
    curvature=(CurvatureRow("encoder.layers.0.attention.projection", 1, 1, 1e-7, 1.0, True, "equal: one sample"),),
    plan_hash="8e7f",
)


@pytest.mark.parametrize("width", [80, 120])
def test_the_report_fits_the_terminal(width: int) -> None:
    console = Console(width=width, markup=False)
    with console.capture() as capture:
        console.print(report_view(REPORT, narrow=width < 100))
    text = capture.get()
    assert max(map(len, text.splitlines())) <= width
    for words in ("projection", "577", "1.4 MB", "1.9e+08", "0,1", "Encoder has", "[bold] is no markup", "1.0e-07"):
        assert words in text
    assert text.rstrip().endswith("run: not ready: 1 thing to put right, and 1 remark")


def test_names_break_at_their_dots(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(REPORT, width=80)
    shown = capsys.readouterr().out
    assert " encoder.layers.0 " in shown
    assert "   .attention" in shown
    print_report(REPORT, width=140)
    assert "encoder.layers.0.attention.projection.weight" in capsys.readouterr().out
