"""Checkpoints that a kill at any moment can't spoil, on torch.distributed.checkpoint (DCP).

    checkpoints/
      step-00000100/          complete: its manifest was written last, then the directory got this name
        __0_0.distcp …        tensors, each rank its share
        .metadata             DCP's table of contents
        manifest.json         step, position in the data, ranks, configuration, size of every file
      step-00000200.writing/  what a kill leaves behind; ignored, and removed by the next save

Saving writes and syncs everything under the second name, then renames. Loading looks at names, manifest and sizes, so a
directory that was copied halfway is no checkpoint either.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, Metadata

from kfac_dist.distributed.communicator import Communicator
from kfac_dist.errors import CheckpointError
from kfac_dist.training.agreement import agreed
from kfac_dist.training.checkpoint_reader import SafeLoadPlanner, SafeReader, check_fit

MANIFEST = "manifest.json"
FORMAT = 1
WRITING = ".writing"

_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        path: Its directory.
        step: Optimizer steps that it holds.
        facts: What was saved beside the tensors, as plain JSON values.
    """

    path: Path
    step: int
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run. Its methods are collective unless they say otherwise.

    Args:
        directory: Where they are; made when needed.
        keep: Newest checkpoints that stay.
        communicator: The ranks of the run.
        notice: Shown one line for each directory that is no complete checkpoint.
    """

    def __init__(
        self, directory: Path, keep: int, communicator: Communicator, notice: Callable[[str], None] = lambda line: None
    ) -> None:
        self.directory = directory
        self.keep = keep
        self.communicator = communicator
        self.notice = notice

    def save(self, step: int, state: dict[str, Any], facts: dict[str, Any]) -> Path:
        """Write a checkpoint and remove those beyond the newest `keep`.

        Args:
            step: Optimizer steps done.
            state: Nested dictionaries with string keys of tensors; equal keys hold equal values on every rank.
            facts: Plain JSON values, the same on every rank.

        Returns:
            Its directory.

        Raises:
            CheckpointError: It can't be written; every rank raises, and older checkpoints are as they were.
        """
        final = self.directory / f"step-{step:08d}"
        partial = final.with_name(final.name + WRITING)
        with agreed(self.communicator, CheckpointError, f"can't prepare {partial}"):
            if self.communicator.rank == 0:
                self._remove_partial()
                partial.mkdir(parents=True)
        with agreed(self.communicator, CheckpointError, f"can't write {partial}"), self._alone() as alone:
            dcp.save(
                state,
                storage_writer=FileSystemWriter(partial, sync_files=True),
                planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
                no_dist=alone,
            )
        with agreed(self.communicator, CheckpointError, f"can't complete {final}"):
            if self.communicator.rank == 0:
                _complete(partial, final, {"format": FORMAT, "step": step, **facts})
                self._remove_old()
        return final

    def newest(self) -> Checkpoint | None:
        """Return the newest complete checkpoint, the same on every rank."""
        found: Checkpoint | None = None
        with agreed(self.communicator, CheckpointError, f"can't read {self.directory}"):
            if self.communicator.rank == 0:
                found = next((found for path in self._by_age() if (found := self._read_or_notice(path))), None)
        newest: Checkpoint | None = self.communicator.gather_objects(found, label="newest checkpoint")[0]
        return newest

    def contents(self, checkpoint: Checkpoint) -> Metadata:
        """Return the table of contents: name, shape and type of every tensor; collective.

        Raises:
            CheckpointError: It can't be read.
        """
        with agreed(self.communicator, CheckpointError, f"can't read {checkpoint.path}"):
            return SafeReader(checkpoint.path).read_metadata()

    def load(self, checkpoint: Checkpoint, state: dict[str, Any], pieces: Iterable[dict[str, Any]] = ()) -> None:
        """Fill the tensors of `state`, in place, whatever number of ranks wrote them.

        Args:
            checkpoint: What to load.
            state: Nested dictionaries with string keys; dots in a key stand for nesting.
            pieces: More of them, each filled before the next is asked for; ranks may have different numbers of them.

        Raises:
            CheckpointError: The checkpoint can't be read, or is of another model: names the first tensor that differs.
        """
        reader = SafeReader(checkpoint.path)
        with agreed(self.communicator, CheckpointError, f"can't read {checkpoint.path}"):
            check_fit(state, reader.read_metadata(), checkpoint.path)
        with agreed(self.communicator, CheckpointError, f"can't load {checkpoint.path}"), self._alone():
            for piece in chain([state], pieces):
                # Each rank reads for itself: there is nothing to plan together.
                dcp.load(piece, storage_reader=reader, planner=SafeLoadPlanner(), no_dist=True)

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Tell whether this process is the only one, and keep DCP from warning that it is."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            yield self.communicator.size == 1

    def _by_age(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        return sorted((path for path in self.directory.iterdir() if path.is_dir()), reverse=True)

    def _read_or_notice(self, path: Path) -> Checkpoint | None:
        try:
            return read_manifest(path)
        except CheckpointError as error:
            self.notice(f"ignored: {error}")
            return None

    def _remove_partial(self) -> None:
        for path in self._by_age():
            if path.name.endswith(WRITING):
                shutil.rmtree(path)

    def _remove_old(self) -> None:
        complete = [path for path in self._by_age() if _NAME.fullmatch(path.name)]
        for path in complete[self.keep :]:
            # Under the other name first: a kill in the midst of removing must not leave half a checkpoint.
            doomed = path.with_name(path.name + WRITING)
            path.rename(doomed)
            shutil.rmtree(doomed)


def read_manifest(path: Path) -> Checkpoint:
    """Return the checkpoint in a directory; not collective.

    Raises:
        CheckpointError: The directory holds no complete checkpoint: says what is missing.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint")
    if not _NAME.fullmatch(path.name):
        raise CheckpointError(f"{path}: not a complete checkpoint (those are named step-<number>)")
    try:
        facts = json.loads((path / MANIFEST).read_text())
        sizes = dict(facts.pop("files"))
        step, version = int(facts.pop("step")), facts.pop("format")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not a complete checkpoint, {MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} can't be read: {error}") from error
    if version != FORMAT:
        raise CheckpointError(f"{path}: its format is {version}, this version of kfac_dist reads {FORMAT}")
    for name, size in sizes.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise CheckpointError(f"{path}: not a complete checkpoint, {name} {state}")
    return Checkpoint(path, step, facts)


def _complete(partial: Path, final: Path, facts: dict[str, Any]) -> None:
    files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    with (partial / MANIFEST).open("w") as stream:
        json.dump({**facts, "files": files}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    _sync_directory(partial)
    replaced = final.with_name(f"{final.name}.replaced{WRITING}")
    if final.exists():  # the same step, saved once more
        final.rename(replaced)
    partial.rename(final)
    _sync_directory(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
