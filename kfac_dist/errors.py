"""Errors that a user can correct: each names the key, layer or rank, and a correction.

The command line prints them without a traceback and exits with code 2; in a library they are ordinary exceptions.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KFACError(Exception):
    """Base of every error that the user, not a bug, causes."""


class ConfigError(KFACError):
    """A configuration that can't run: names the file, the line or path, the value found and the values allowed."""


class ModelError(KFACError):
    """A model that K-FAC can't serve as asked: names the layer."""


class ExtensionError(KFACError):
    """A registration that is refused: names the function, its argument and a correction."""


class DataError(KFACError):
    """Data that can't be trained on: names the data set and its problem."""


class CheckpointError(KFACError):
    """A checkpoint that can't be read, written or applied: names the file or the block."""


class CollectiveError(KFACError):
    """A collective that failed or timed out: names the operation, its contents and the rank that waited."""


class PlanMismatchError(KFACError):
    """Ranks that disagree about the work: names the first block that differs, on every rank."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Name the closest known name as `"; did you mean 'x'?"`, or return nothing."""
    spelled = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), spelled, n=1)
    return f"; did you mean '{spelled[close[0]]}'?" if close else ""
