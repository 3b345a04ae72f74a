"""Tables as the doctor sets them."""

from __future__ import annotations

from rich import box
from rich.table import Table

_NAME_WIDTH = 20


def plain_table(first: str, *others: str, narrow: bool) -> Table:
    """Return a table whose first column may break, without gaps between columns where there is little room."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0) if narrow else (0, 1))
    table.add_column(first, overflow="fold")
    for heading in others:
        table.add_column(heading, no_wrap=True)
    return table


def name_lines(name: str, narrow: bool) -> str:
    """Break a long name at its dots where there is little room."""
    lines = [""]
    for part in name.split("."):
        piece = f".{part}" if lines[-1] or len(lines) > 1 else part
        if narrow and lines[-1] and len(lines[-1]) + len(piece) > _NAME_WIDTH:
            lines.append("  ")
        lines[-1] += piece
    return "\n".join(lines)
