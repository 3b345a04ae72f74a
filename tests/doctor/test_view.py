"""The report fits a terminal of 80 columns and keeps every name whole."""

from __future__ import annotations

import pytest
from rich.console import Console

from kfac_dist.doctor.findings import CurvatureRow, Finding, ParameterRow, Report, Severity
from kfac_dist.doctor.fisher.report import FisherCost, FisherReport, FisherRow, TrendRow
from kfac_dist.doctor.view import print_report, report_view


def _layer(name: str, role: str, second: float | None, refused: str = "") -> FisherRow:
    return FisherRow(
        layer=name,
        role=role,
        values=7000,
        coordinates=128,
        trace=1.2e4,
        first=1.41,
        first_drawn=1.39,
        second=second,
        second_drawn=second,
        data=0.12,
        empirical=0.9,
        structural=second == 0,
        curvedness=1e-7,
        bend=0.0,
        refused=refused,
        labels_first=199,
        labels_second=None if second is None else 0,
    )


LAYERS = [f"encoder.layers.{index}.attention.projection" for index in range(12)]
FISHER = FisherReport(
    likelihood="categorical",
    columns=10,
    samples=32,
    draws=16,
    deviation=0.1,
    layers=(*(_layer(name, "", None, "relu in x") for name in LAYERS), _layer("head", "last", 0.0)),
    trend=tuple(
        TrendRow(step, name, 1.0, float(index), None if name in LAYERS else 0.0, 1.4, 0.0, 0.9)
        for step in (0, 2, 5, 10, 23, 50)
        for index, name in enumerate([*LAYERS, "head"])
    ),
    cost=FisherCost(0.0127, 0.00269, 0.00028),
    advice=("a sentence that is [bold] and long enough to need another line on a terminal of eighty columns",),
)
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
    fisher=FISHER,
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


def test_of_many_layers_the_noisiest_and_the_last_are_followed(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(REPORT, width=140)
    shown = capsys.readouterr().out
    course = shown[shown.index("N·Var after steps") :]
    assert "layers.11." in course
    assert "layers.3." in course
    assert "layers.2." not in course
    assert "head" in course
    assert "2.69 ms; a step takes 12.7 ms (0.21 of it)" in shown
    assert "0 (exact)" in shown
    assert shown.count("refused") == 24
