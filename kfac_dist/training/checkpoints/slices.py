"""Tensors of a checkpoint by name and range, so that any rank of any engine finds the elements that it holds.

    model.blocks.0.weight                 all elements, in the parameter's shape
    model.blocks.0.weight@4800-9600       these elements of the flattened parameter

A rank saves the runs that it holds under such names. Loading reads the table of contents and puts together what a rank
wants: from the run of the same name straight into place; else from the runs that overlap, a few at a time.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from kfac_dist.errors import CheckpointError

_RUN = re.compile(r"(?P<name>.+)@(?P<start>\d+)-(?P<stop>\d+)")
# Bytes that are read before they are cut up and dropped again.
_STAGED_BYTES = 2**28


@dataclass(frozen=True)
class SavedRun:
    """Elements [start, stop) of a flattened tensor, saved under `full_name`."""

    full_name: str
    start: int
    stop: int
    entry: TensorStorageMetadata

    @property
    def is_whole(self) -> bool:
        """Whether it is saved as a whole tensor, in its shape."""
        return "@" not in self.full_name


@dataclass(frozen=True)
class Wanted:
    """Elements of a tensor that a rank holds, and where they go.

    Attributes:
        name: The tensor's name.
        start: Its first wanted element.
        into: Memory of the elements; contiguous unless it is a whole parameter.
    """

    name: str
    start: int
    into: Tensor

    @property
    def stop(self) -> int:
        """The element after the last."""
        return self.start + self.into.numel()


def run_name(name: str, start: int, values: Tensor, *, whole: bool) -> str:
    """Return the name under which a run is saved."""
    return name if whole else f"{name}@{start}-{start + values.numel()}"


def saved_runs(contents: Metadata) -> dict[str, list[SavedRun]]:
    """Return the tensors of a checkpoint by name without range, each with its runs in ascending order."""
    found: dict[str, list[SavedRun]] = defaultdict(list)
    for full_name, entry in contents.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        cut = _RUN.fullmatch(full_name)
        if cut is None:
            found[full_name].append(SavedRun(full_name, 0, entry.size.numel(), entry))
        else:
            found[cut["name"]].append(SavedRun(full_name, int(cut["start"]), int(cut["stop"]), entry))
    return {name: sorted(runs, key=lambda run: (run.start, run.stop)) for name, runs in found.items()}


def straight(wanted: list[Wanted], saved: Mapping[str, list[SavedRun]]) -> dict[str, Tensor]:
    """Return the tensors that can be read in place: saved name to memory."""
    exact = ((want, _exact(want, saved)) for want in wanted)
    return {run.full_name: want.into.view(run.entry.size) for want, run in exact if run is not None}


def piecewise(wanted: list[Wanted], saved: Mapping[str, list[SavedRun]]) -> Iterator[dict[str, Tensor]]:
    """Yield tensors to fill from the checkpoint, some at a time; once filled, their needed parts are copied."""
    staged: dict[str, Tensor] = {}
    uses: list[tuple[Wanted, SavedRun]] = []
    for want in wanted:
        if _exact(want, saved) is not None:
            continue
        for run in _overlapping(want, saved):
            if run.full_name not in staged:
                staged[run.full_name] = torch.empty(run.entry.size, dtype=run.entry.properties.dtype)
            uses.append((want, run))
        if sum(tensor.nbytes for tensor in staged.values()) > _STAGED_BYTES:
            yield staged
            _take(staged, uses)
            staged, uses = {}, []
    if staged:
        yield staged
        _take(staged, uses)


def _take(staged: dict[str, Tensor], uses: list[tuple[Wanted, SavedRun]]) -> None:
    for want, run in uses:
        first, last = max(want.start, run.start), min(want.stop, run.stop)
        flat = want.into.reshape(-1)
        flat[first - want.start : last - want.start] = staged[run.full_name].view(-1)[
            first - run.start : last - run.start
        ]
        if flat.data_ptr() != want.into.data_ptr():  # of another memory format, so that this was a copy
            want.into.copy_(flat.view(want.into.shape))


def _exact(want: Wanted, saved: Mapping[str, list[SavedRun]]) -> SavedRun | None:
    same = (run for run in saved.get(want.name, ()) if (run.start, run.stop) == (want.start, want.stop))
    return next(same, None)


def _overlapping(want: Wanted, saved: Mapping[str, list[SavedRun]]) -> list[SavedRun]:
    """Return runs that cover the wanted range.

    Raises:
        CheckpointError: Elements are missing.
    """
    taken: list[SavedRun] = []
    reached = want.start
    for run in saved.get(want.name, ()):
        if run.start <= reached < run.stop and reached < want.stop:
            taken.append(run)
            reached = run.stop
    if reached < want.stop:
        raise CheckpointError(f"{want.name}: elements from {reached} on are not in the checkpoint")
    return taken
