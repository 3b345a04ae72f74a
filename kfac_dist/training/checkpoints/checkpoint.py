"""Checkpoints that a kill at any moment can't spoil, on torch.distributed.checkpoint (DCP).

    checkpoints/
      step-00000100/          complete: its manifest was written last, then the directory got this name
        __0_0.distcp …        tensors, each rank its share
        .metadata             DCP's table of contents
        manifest.json         step, position in the data, ranks, configuration, size and hash of every file
      step-00000200.writing/  left by a killed run; ignored, and removed by the next save
      step-00000150.aside/    damaged, or left behind by going back to an earlier step; removed by the next save

    training   ── copy to host memory ──▶ step ── step ── step ── …        waits only if the last write isn't over
    a thread      └─▶ write, sync, hash ── manifest ── rename              has a process group of its own

Saving writes and syncs everything under the second name, then renames. Loading looks at names, manifest, sizes and
hashes, so a directory that was copied halfway or altered is no checkpoint either.
"""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner, FileSystemWriter, Metadata

from kfac_dist.compat.torch import load_dcp, save_dcp
from kfac_dist.distributed.communicators.agreement import agreed
from kfac_dist.distributed.communicators.base import Communicator, SoloCommunicator
from kfac_dist.distributed.communicators.build import build_communicator
from kfac_dist.errors import CheckpointError, KFACError
from kfac_dist.training.checkpoints.background import Background
from kfac_dist.training.checkpoints.manifest import MANIFEST as MANIFEST
from kfac_dist.training.checkpoints.manifest import NAME, FileFacts, damaged, file_facts, sync_directory, write_manifest
from kfac_dist.training.checkpoints.manifest import Checkpoint as Checkpoint
from kfac_dist.training.checkpoints.manifest import read_manifest as read_manifest
from kfac_dist.training.checkpoints.reader import SafeLoadPlanner, SafeReader, check_fit

WRITING = ".writing"
ASIDE = ".aside"
# A run that fails gives a write under way so long to end: its ranks may have lost each other.
GRACE_SECONDS = 10.0

# DCP warns that a single process is alone, which it may be. Not around the call: filters belong to all threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable", category=UserWarning)


class Checkpoints:
    """The checkpoints of one run. Its methods are collective unless they say otherwise.

    Args:
        directory: Their directory; made when needed.
        keep: Newest checkpoints that stay.
        communicator: The ranks of the run.
        notice: Shown one line for each directory that is no complete checkpoint.
        timeout_seconds: Seconds that writing ranks wait for each other.
        job: The job, written into each checkpoint.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        communicator: Communicator,
        notice: Callable[[str], None] = lambda line: None,
        timeout_seconds: float = 600.0,
        job: str = "",
    ) -> None:
        self.directory = directory
        self.keep = keep
        self.communicator = communicator
        self.notice = notice
        self.job = job
        self._timeout = timeout_seconds
        self._writers: Communicator | None = None
        self._background = Background()

    def save(self, step: int, state: dict[str, Any], facts: dict[str, Any], *, wait: bool = True) -> Path:
        """Write a checkpoint and remove those beyond the newest `keep`, once the last write is over.

        Args:
            step: Optimizer steps done.
            state: Nested dictionaries with string keys of tensors; equal keys hold equal values on every rank.
            facts: Plain JSON values, the same on every rank.
            wait: Whether it is complete on return. Otherwise only a copy of the state has been made, and what fails
                later is raised by the next `save` or `finish`.

        Returns:
            Its directory.

        Raises:
            CheckpointError: It can't be written; every rank raises, and older checkpoints are as they were.
        """
        self._background.finish()
        facts = facts | ({"job": self.job} if self.job else {})
        if self._writers is None:
            alone = self.communicator.size == 1
            self._writers = SoloCommunicator() if alone else build_communicator(self._timeout, on_host=True)
        if wait:
            return self._write(step, state, facts, self._writers)
        copy, writers = on_host(state), self._writers
        self._background.start(lambda: self._write(step, copy, facts, writers), f"checkpoint of step {step}")
        return self._path(step)

    @property
    def failed(self) -> bool:
        """Whether a write has failed and not been reported; not collective."""
        return self._background.failed

    def finish(self) -> None:
        """Wait until the current write is complete.

        Raises:
            CheckpointError: It could not be written; every rank raises.
        """
        self._background.finish()

    def close(self) -> None:
        """Let go of the ranks; a write that is still under way after a while is left to itself."""
        with suppress(KFACError):  # the run fails already, by an error that came before
            self._background.finish(GRACE_SECONDS)
        if self._writers is not None:
            self._writers.close()
            self._writers = None

    def newest(self, *, own: bool = False) -> Checkpoint | None:
        """Return the newest checkpoint that is complete and unaltered, the same on every rank.

        Args:
            own: Look at this job's only.
        """
        found: list[Checkpoint] = []
        with agreed(self.communicator, CheckpointError, f"can't read {self.directory}"):
            if self.communicator.rank == 0:
                found = [checkpoint for path in self._by_age() if (checkpoint := self._read_or_notice(path))]
        candidates: list[Checkpoint] = self.communicator.gather_objects(found, label="newest checkpoint")[0]
        for candidate in candidates:
            if own and candidate.facts.get("job", "") != self.job:
                continue
            problem = self._damage(candidate)
            if problem is None:
                return candidate
            self.notice(f"ignored: {problem}")
        return None

    def verify(self, checkpoint: Checkpoint) -> None:
        """Check that a checkpoint's files are unchanged.

        Raises:
            CheckpointError: They aren't; every rank raises.
        """
        problem = self._damage(checkpoint)
        if problem is not None:
            raise CheckpointError(problem)

    def set_aside(self, step: int) -> None:
        """Move the checkpoints beyond a step aside: the run continues from there."""
        self._background.finish()
        with agreed(self.communicator, CheckpointError, f"can't rename checkpoints in {self.directory}"):
            for path in self._by_age() if self.communicator.rank == 0 else ():
                if (match := NAME.fullmatch(path.name)) and int(match[1]) > step:
                    self._remove(path.with_name(path.name + ASIDE))
                    path.rename(path.with_name(path.name + ASIDE))

    def contents(self, checkpoint: Checkpoint) -> Metadata:
        """Return the table of contents: name, shape and type of every tensor; collective.

        Raises:
            CheckpointError: It can't be read.
        """
        with agreed(self.communicator, CheckpointError, f"can't read {checkpoint.path}"):
            return SafeReader(checkpoint.path).read_metadata()

    def load(self, checkpoint: Checkpoint, state: dict[str, Any], pieces: Iterable[dict[str, Any]] = ()) -> None:
        """Fill the tensors of `state`, in place, from a checkpoint of any number of ranks.

        Args:
            checkpoint: The checkpoint.
            state: Nested dictionaries with string keys; dots in a key stand for nesting.
            pieces: More of them, each filled before the next is asked for; ranks may have different numbers of them.

        Raises:
            CheckpointError: The checkpoint can't be read, or is of another model: names the first tensor that differs.
        """
        reader = SafeReader(checkpoint.path)
        with agreed(self.communicator, CheckpointError, f"can't read {checkpoint.path}"):
            check_fit(state, reader.read_metadata(), checkpoint.path)
        with agreed(self.communicator, CheckpointError, f"can't load {checkpoint.path}"), _readable(checkpoint.path):
            for piece in chain([state], pieces):
                # Each rank reads for itself: there is nothing to plan together.
                load_dcp(piece, storage_reader=reader, planner=SafeLoadPlanner())

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _write(self, step: int, state: dict[str, Any], facts: dict[str, Any], writers: Communicator) -> Path:
        """Write a checkpoint; runs in a thread, and talks over its own ranks only."""
        final = self._path(step)
        partial = final.with_name(final.name + WRITING)
        with agreed(writers, CheckpointError, f"can't prepare {partial}"):
            if writers.rank == 0:
                self._remove_partial()
                partial.mkdir(parents=True)
        try:
            with agreed(writers, CheckpointError, f"can't write {partial}"), _first_failure(partial, writers.rank):
                save_dcp(
                    state,
                    storage_writer=FileSystemWriter(partial, sync_files=True),
                    planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
                    process_group=writers.group,
                    no_dist=writers.size == 1,
                )
            with agreed(writers, CheckpointError, f"can't complete {final}"):
                own = {path.name: file_facts(path) for path in _files_of(partial, writers.rank)}
            files = {name: f for part in writers.gather_objects(own, label="checkpoint") for name, f in part.items()}
            with agreed(writers, CheckpointError, f"can't complete {final}"):
                if writers.rank == 0:
                    _complete(partial, final, {"step": step, **facts}, files)
                    self._remove_old()
        except CheckpointError:
            if writers.rank == 0:  # a full disk needs the room
                shutil.rmtree(partial, ignore_errors=True)
            raise
        return final

    def _damage(self, checkpoint: Checkpoint) -> str | None:
        """Return the problem with a checkpoint's contents, the same on every rank; each reads some of the files."""
        own = damaged(checkpoint, self.communicator.rank, self.communicator.size)
        problems: list[str | None] = self.communicator.gather_objects(own, label="newest checkpoint")
        return next((problem for problem in problems if problem is not None), None)

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
        for path in self._ending_in(WRITING):
            _remove_tree(path)

    def _remove_old(self) -> None:
        for path in self._ending_in(ASIDE):
            _remove_tree(path)
        complete = [path for path in self._by_age() if NAME.fullmatch(path.name)]
        for path in complete[self.keep :]:
            self._remove(path)

    def _ending_in(self, suffix: str) -> list[Path]:
        """Return existing entries for a name: directories, and anything else."""
        if not self.directory.is_dir():
            return []
        return [path for path in self.directory.iterdir() if path.name.endswith(suffix)]

    def _remove(self, path: Path) -> None:
        if os.path.lexists(path):
            # Under the other name first: a kill in the midst of removing must not leave half a checkpoint.
            doomed = path.with_name(path.name + WRITING)
            path.rename(doomed)
            _remove_tree(doomed)


def _remove_tree(path: Path) -> None:
    """Remove a directory, or a file or link in its place; never a link's target."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def on_host(state: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of nested dictionaries of tensors in host memory, waiting for the device once."""
    devices: set[torch.device] = set()

    def copied(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: copied(inner) for key, inner in value.items()}
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        if not value.is_cuda:
            return value.to("cpu", copy=True)
        devices.add(value.device)
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)

    copy: dict[str, Any] = copied(state)
    for device in devices:
        torch.cuda.synchronize(device)
    return copy


@contextmanager
def _first_failure(partial: Path, rank: int) -> Iterator[None]:
    """Raise the cause, instead of DCP's collection of every rank's traceback, which is no `Exception`."""
    try:
        yield
    except CheckpointException as error:
        failed, (reason, _) = min(error.failures.items())
        refusal = _refusal(partial / f"room-{rank}") or next(iter(str(reason).splitlines()), type(reason).__name__)
        raise CheckpointError(f"rank {failed} can't write its part to {partial}: {refusal}") from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise why a file can't be read, instead of DCP's collection of tracebacks."""
    try:
        yield
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        lines = str(reason).strip().splitlines() or [type(reason).__name__]
        if isinstance(reason, pickle.UnpicklingError):  # torch advises to allow the named code
            blocked = next((line for line in lines if "GLOBAL" in line), lines[0])
            raise CheckpointError(f"{path}: a value is damaged, or made to run code: {blocked}") from error
        raise CheckpointError(f"{path}: {lines[0]}") from error


def _refusal(path: Path) -> str | None:
    """Return why a file can't be written, or None if it can: torch.save hides the system's reason."""
    try:
        path.write_bytes(bytes(2**20))
        path.unlink()
    except OSError as error:
        return error.strerror
    return None


def _files_of(partial: Path, rank: int) -> Iterator[Path]:
    """Yield the files that a rank has written: its data, and rank 0 the table of contents."""
    yield from partial.glob(f"__{rank}_*")
    if rank == 0:
        yield partial / ".metadata"


def _complete(partial: Path, final: Path, facts: dict[str, Any], files: dict[str, FileFacts]) -> None:
    write_manifest(partial, facts, files)
    replaced = final.with_name(f"{final.name}.replaced{WRITING}")
    if os.path.lexists(final):  # the same step, saved once more
        final.rename(replaced)
    partial.rename(final)
    sync_directory(final.parent)
    if os.path.lexists(replaced):
        _remove_tree(replaced)
