"""What this rank sends, counted by what it is: the numbers that tests compare with the formulas and metrics report."""

from __future__ import annotations

from collections import defaultdict


class Traffic:
    """What this rank has sent, by label: numbers of collectives, and bytes by the formulas of `cost`.

    A label names what travels ("factors", "inverses", "gradients"). One counter serves a communicator and all that are
    split from it. Collectives among one rank are not counted: nothing travels.
    """

    def __init__(self) -> None:
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.bytes_sent: defaultdict[str, int] = defaultdict(int)

    @property
    def total_calls(self) -> int:
        """Collectives that this rank took part in."""
        return sum(self.calls.values())

    @property
    def total_bytes(self) -> int:
        """Bytes that this rank sent."""
        return sum(self.bytes_sent.values())

    def count(self, label: str, nbytes: int) -> None:
        """Adds one collective that sends `nbytes` from this rank."""
        self.calls[label] += 1
        self.bytes_sent[label] += nbytes

    def snapshot(self) -> dict[str, tuple[int, int]]:
        """Label to (collectives, bytes sent) so far."""
        return {label: (self.calls[label], self.bytes_sent[label]) for label in sorted(self.calls)}

    def reset(self) -> None:
        """Starts counting afresh."""
        self.calls.clear()
        self.bytes_sent.clear()
