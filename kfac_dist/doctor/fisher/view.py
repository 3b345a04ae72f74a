"""The diagonal Fisher's estimators on a terminal, from 80 columns on."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kfac_dist.doctor.fisher.report import FisherReport, FisherRow, TrendRow
from kfac_dist.doctor.tables import name_lines, plain_table

# Layers whose course is shown.
FOLLOWED = 10


def fisher_view(report: FisherReport, *, narrow: bool) -> RenderableType:
    """Return tables of the layers, of their course, of costs, and the advice."""
    return Group(_layers(report, narrow), _trend(report, narrow), _cost(report), "", _advice(report))


def _layers(report: FisherReport, narrow: bool) -> Table:
    table = plain_table("diagonal Fisher", narrow=narrow)
    percent = f"{report.deviation:.0%}"
    for heading in ("tr I", "Î1", "drawn", "Î2", "drawn", "data", "better", f"labels\n{percent}"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report.layers:
        name = f"{name_lines(row.layer, narrow)}{f' ({row.role})' if row.role else ''}"
        table.add_row(
            name,
            f"{row.trace:.2g}",
            _deviation(row.first),
            _deviation(row.first_drawn),
            _second(row, row.second),
            _second(row, row.second_drawn),
            _deviation(row.data),
            row.better,
            str(row.labels_second if row.better == "Î2" else row.labels_first),
        )
    table.caption = (
        f"relative standard deviations of one sample with one label ({report.likelihood}): closed forms, and from "
        f"{report.draws} labels drawn for each of {report.samples} samples{_coordinates(report)}"
    )
    table.caption_justify = "left"
    return table


def _coordinates(report: FisherReport) -> str:
    seen, values = (sum(getattr(row, key) for row in report.layers) for key in ("coordinates", "values"))
    return "" if seen == values else f", at {seen:,} of {values:,} values, drawn at random from each parameter"


def _trend(report: FisherReport, narrow: bool) -> Table:
    steps = sorted({row.step for row in report.trend})
    found = {(row.layer, row.step): row for row in report.trend}
    table = plain_table("N·Var after steps", narrow=narrow)
    table.add_column("", no_wrap=True)
    for step in steps:
        table.add_column(str(step), justify="right", no_wrap=True)
    shown = _worth_following(report)
    for layer in shown:
        rows: list[TrendRow] = [found[layer, step] for step in steps]
        table.add_row(name_lines(layer, narrow), "tr I", *(f"{row.trace:.2g}" for row in rows))
        table.add_row("", "Î1", *(f"{row.first:.1e}" for row in rows))
        if rows[0].second is not None:
            table.add_row("", "Î2", *(f"{row.second:.1e}" if row.second else "0" for row in rows))
    if len(shown) < len(report.layers):
        table.caption = f"the noisiest and the last two of {len(report.layers)} layers; --json has them all"
        table.caption_justify = "left"
    return table


def _worth_following(report: FisherReport) -> list[str]:
    """Return the layers to show over the steps, in their order: of many, those where Î1 varies most, and the last."""
    names = [row.layer for row in report.layers]
    if len(names) <= FOLLOWED:
        return names
    at_first = {row.layer: row.first for row in report.trend if row.step == 0}
    noisiest = sorted(names[:-2], key=at_first.__getitem__)[2 - FOLLOWED :]
    return [name for name in names if name in {*noisiest, *names[-2:]}]


def _cost(report: FisherReport) -> Text:
    cost = report.cost
    step = "" if cost.step is None else f"; a step takes {cost.step * 1e3:.3g} ms"
    share = f" ({cost.backward / cost.step:.2f} of it)" if cost.step else ""
    return Text(
        f"resampling labels: one more backward of a step's batch takes {cost.backward * 1e3:.3g} ms{step}{share}; "
        f"∂_ih and ∂²_iih of one value, {report.samples} samples: {cost.coordinate * 1e3:.2g} ms"
    )


def _advice(report: FisherReport) -> Table:
    table = Table.grid(padding=(0, 1))
    for sentence in report.advice:
        table.add_row("•", Text(sentence))
    return table


def _second(row: FisherRow, value: float | None) -> Text:
    if value is None:
        return Text("refused", style="yellow")
    return Text("0 (exact)" if row.structural and value == 0 else _deviation(value))


def _deviation(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}" if 0.01 <= value < 1000 else f"{value:.0e}"
