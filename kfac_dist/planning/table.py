"""Tables of comparisons: a row per strategy, the bottleneck, and the recommendation as YAML."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table

from kfac_dist.planning.comparison import Comparison, fragment, words, words_of
from kfac_dist.planning.machines.hardware import Hardware
from kfac_dist.planning.prediction import PHASES, Prediction
from kfac_dist.planning.strategies import Changes, Strategy

_BOTTLENECKS = 5
# Number of strategies with the same steps and with others; recommended ones are added.
_ROWS = 3
_SI = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def view(comparisons: Sequence[Comparison], *, everything: bool = False) -> Group:
    """Return the tables of all numbers of ranks, ready for rich to print.

    Args:
        comparisons: A comparison for each.
        everything: Whether to show all strategies, not just the quickest.
    """
    parts: list[Table | str] = [_heading(comparisons[0].hardware), ""]
    for comparison in comparisons:
        parts += [*_one(comparison, everything=everything), ""]
    return Group(*parts)


def _heading(hardware: Hardware) -> str:
    origin = (
        f"measured on {hardware.ranks} rank(s)"
        if hardware.kind == "measured"
        else "datasheet figures with assumed efficiencies, not measured"
    )
    notes = "".join(f"\n  {note}" for note in hardware.notes)
    return f"Predicted for {hardware.name} ({hardware.device}): {origin}{notes}"


def _one(comparison: Comparison, *, everything: bool) -> list[Table | str]:
    rows = list(comparison.predictions) if everything else _rows(comparison)
    shared = _shared([row.strategy for row in rows])
    best, configured, quicker = comparison.best, comparison.configured, comparison.quicker
    hidden = len(comparison.predictions) - len(rows)
    parts: list[Table | str] = [
        f"{comparison.world_size} ranks, {configured.job.node_size} a node, {configured.samples:g} samples a rank and "
        f"step; ms are what K-FAC adds to a step, bytes and flops those of the rank with the most to invert",
        *([f"Every row but * has {words_of(shared)}; the rows name what else they change."] if shared else []),
        _table(comparison, rows, shared),
        *([f"{hidden} other strategies are slower than those of their kind: --all shows them."] if hidden else []),
        *([comparison.note] if comparison.note else []),
        *_bottlenecks(configured),
        "",
    ]
    gain = configured.seconds - best.seconds
    if best is configured:
        parts.append("Recommended: as configured; no other strategy that takes the same steps is 3 % quicker.")
    else:
        parts += [
            f"Recommended: {words(best.strategy)} ({_ms(gain)} ms a step less). To paste:",
            "",
            fragment(best.strategy),
        ]
    if not comparison.fits(best):
        parts.append(
            "It needs more than half of a device's memory, as every strategy does: shard the engine or the blocks."
        )
    if quicker is not None:
        saved = _ms(best.seconds - quicker.seconds)
        parts.append(f"Another {saved} ms less, by other steps: {words(quicker.strategy)}.")
    return parts


def _rows(comparison: Comparison) -> list[Prediction]:
    """Return the fastest strategies with the same steps, as many with others, and the recommended ones."""
    same, other = ([p for p in comparison.predictions if p.strategy.same_mathematics is kind] for kind in (True, False))
    shown = (comparison.configured, comparison.best, comparison.quicker, *same[:_ROWS], *other[:_ROWS])
    return [found for found in comparison.predictions if any(found is one for one in shown)]


def _shared(strategies: Sequence[Strategy]) -> Changes:
    """Return the changes that all strategies but the configured one have, if there are several to tell apart."""
    changed = [strategy.changes for strategy in strategies if not strategy.configured]
    if len(changed) < 2:
        return {}
    found = {
        section: {
            key: value for key, value in own.items() if all(_has(other, section, key, value) for other in changed)
        }
        for section, own in changed[0].items()
    }
    return {section: own for section, own in found.items() if own}


def _has(changes: Changes, section: str, key: str, value: object) -> bool:
    own = changes.get(section, {})
    return key in own and own[key] == value


def _name(strategy: Strategy, shared: Changes) -> str:
    """Return a row's changes beyond those of all rows."""
    if strategy.configured:
        return words(strategy)
    own = {
        section: {key: value for key, value in changes.items() if not _has(shared, section, key, value)}
        for section, changes in strategy.changes.items()
    }
    return words_of(own) or "nothing else"


def _table(comparison: Comparison, rows: Sequence[Prediction], shared: Changes) -> Table:
    table = Table("", "strategy", box=box.SIMPLE_HEAD, pad_edge=False)
    headings = ("ms", "worst step", "sent", "worst step", "collectives", "flops", "load max/mean", "kept at most")
    for heading in headings:
        table.add_column(heading, justify="right")
    for found in rows:
        mark = "→" if found is comparison.best else "*" if found.strategy.configured else ""
        other = "" if found.strategy.same_mathematics else " (other steps)"
        kept = _si(found.memory.total) + ("" if comparison.fits(found) else " !")
        table.add_row(
            mark,
            _name(found.strategy, shared) + other,
            _ms(found.seconds),
            _ms(found.worst_seconds),
            _si(found.bytes_sent),
            _si(found.worst_bytes),
            str(found.worst_collectives),
            _si(found.flops),
            f"{found.job.plan.assignment.imbalance():.2f}",
            kept,
        )
    return table


def _bottlenecks(found: Prediction) -> list[str]:
    total = found.seconds or 1.0
    shares = ", ".join(
        f"{p} {100 * seconds / total:.0f} %" for p, seconds in found.phases.items() if seconds > 0.005 * total
    )
    ordered = sorted(found.blocks.items(), key=lambda block: -sum(block[1].values()))
    lines = [f"As configured: {shares}. Blocks that take rank {found.job.busiest} longest, in ms an average step:"]
    for name, seconds in ordered[:_BOTTLENECKS]:
        parts = ", ".join(f"{phase} {_ms(seconds[phase])}" for phase in PHASES if seconds[phase] > 0)
        units = found.job.plan.blocks[name].units
        largest = max(units, key=lambda unit: unit.cost)
        lines.append(f"  {name}: {parts} (largest factor {largest.side} of {largest.dim})")
    return lines


def _ms(seconds: float) -> str:
    milliseconds = 1000 * seconds
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _si(value: float) -> str:
    for letter, unit in _SI:
        if value >= unit:
            return f"{value / unit:.3g} {letter}"
    return f"{value:.0f}"
