"""The report on a terminal, from 80 columns on."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kfac_dist.doctor.findings import CurvatureRow, ParameterRow, Report, Severity
from kfac_dist.doctor.fisher.view import fisher_view
from kfac_dist.doctor.tables import name_lines, plain_table

_MARKS = {Severity.FINE: ("✓", "green"), Severity.WARNING: ("!", "yellow"), Severity.ERROR: ("✗", "red")}


# Below this width tables are set without gaps, and names break at their dots.
_NARROW = 100


def report_view(report: Report, *, narrow: bool = False) -> RenderableType:
    """Return the report for rich to print, with the verdict at its end."""
    parts: list[RenderableType] = [_environment(report)]
    if report.parameters:
        parts.append(parameter_table(report.parameters, narrow=narrow))
    if report.curvature:
        parts.append(curvature_table(report.curvature, narrow=narrow))
    if report.fisher is not None:
        parts.append(fisher_view(report.fisher, narrow=narrow))
    verdict = Text(f"{report.name}: {report.verdict}", style="bold green" if report.ready else "bold red")
    return Group(*parts, _findings(report), "", verdict)


def print_report(report: Report, *, width: int | None = None) -> None:
    """Print the report, in the given width where the output is no terminal."""
    console = Console(markup=False, highlight=False, width=width)
    console.print(report_view(report, narrow=console.width < _NARROW))


def parameter_table(rows: tuple[ParameterRow, ...], *, narrow: bool = False) -> Table:
    """Return one row a parameter; a block's costs stand in its first parameter's row."""
    table = plain_table("parameter", "shape", "block", narrow=narrow)
    table.add_column("factors", overflow="fold")
    for heading in ("bytes", "n³", "owner"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        name, shape = name_lines(row.name, narrow), "×".join(map(str, row.shape)) or "scalar"
        if row.block is None:
            size = _bytes(row.factor_bytes) if row.factor_bytes else ""
            table.add_row(name, shape, row.kind or "–", Text(row.reason, style="yellow"), size)
            continue
        if not row.factors:
            table.add_row(name, shape, row.kind, Text("same block", style="dim"))
            continue
        factors = row.factors.replace("  ", " ") if narrow else row.factors
        owners = ",".join(map(str, row.owners))
        table.add_row(name, shape, row.kind, factors, _bytes(row.factor_bytes), f"{row.inversion_cost:.1e}", owners)
    total, cost = sum(row.factor_bytes for row in rows), sum(row.inversion_cost for row in rows)
    table.add_section()
    table.add_row("all", "", "", "", _bytes(total), f"{cost:.1e}", "")
    return table


def curvature_table(rows: tuple[CurvatureRow, ...], *, narrow: bool = False) -> Table:
    """Return one row a comparison with the exact Gauss–Newton matrix."""
    table = plain_table("A ⊗ G against the\nexact GGN" if narrow else "A ⊗ G against the exact GGN", narrow=narrow)
    for heading in ("samples", "error", "cosine"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("expected", overflow="fold")
    for row in rows:
        error = "–" if row.error is None else f"{row.error:.1e}" if row.error < 0.01 else f"{row.error:.2f}"
        cosine = "–" if row.cosine is None else f"{row.cosine:.3f}"
        table.add_row(name_lines(row.block, narrow), str(row.samples), error, cosine, row.expected)
    return table


def _environment(report: Report) -> Table:
    table = Table.grid(padding=(0, 2))
    versions = [f"{name} {value}" for name, value in report.environment.items() if name not in ("ranks", "engine")]
    table.add_row("run", report.name)
    table.add_row("ranks", f"{report.environment['ranks']}, engine {report.environment['engine']}")
    table.add_row("versions", ", ".join(versions))
    if report.plan_hash:
        table.add_row("plan", report.plan_hash)
    return table


def _findings(report: Report) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for finding in report.findings:
        mark, style = _MARKS[finding.severity]
        table.add_row(Text(mark, style=style), finding.check, Padding(Text(finding.text), 0))
    return table


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"
