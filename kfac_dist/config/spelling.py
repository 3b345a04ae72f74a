"""Suggestions for a name that doesn't exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Name the closest known name as `"; did you mean 'x'?"`, or return nothing."""
    spelled = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), spelled, n=1)
    return f"; did you mean '{spelled[close[0]]}'?" if close else ""
