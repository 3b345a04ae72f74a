"""Files that a run writes while it trains: one JSON object a logged step, and the same for TensorBoard if installed."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from kfac_dist.errors import KFACError
from kfac_dist.reporting.pictures import is_pictures, write_grid
from kfac_dist.reporting.sinks import Sink

METRICS_FILE = "metrics.jsonl"
CURVATURE_FILE = "curvature.jsonl"


class MetricsWriter:
    """Writes `metrics.jsonl`, `curvature.jsonl` and TensorBoard events; used by rank 0 alone.

    Lines are flushed one by one: a killed run keeps what it logged.

    Args:
        directory: The run's directory.
        first_step: Steps that a resumed run has done; later entries of an earlier attempt are dropped.
        sinks: Further destinations of records, by name; closed with the files.

    Attributes:
        failure: Why a record could not be written. It is kept, not raised: rank 0 must not leave the others alone.
    """

    def __init__(self, directory: Path, first_step: int = 0, sinks: Mapping[str, Sink] | None = None) -> None:
        self.failure: KFACError | None = None
        self._directory = directory
        self._sinks = sinks or {}
        self._open(first_step)

    def _open(self, first_step: int) -> None:
        self._streams = {
            METRICS_FILE: _continued(self._directory / METRICS_FILE, first_step),
            # A reading is of the step that is under way: it is numbered by the steps done before.
            CURVATURE_FILE: _continued(self._directory / CURVATURE_FILE, first_step - 1),
        }
        self._board = _tensorboard(self._directory / "tensorboard", first_step)

    def rewind(self, step: int) -> None:
        """Forget the entries beyond a step: the run continues from there."""
        self._close_files()
        self._open(step)
        for name, sink in self._sinks.items():
            with self._noting_sink(name, "rewind"):
                sink.rewind(step)

    def write(self, record: dict[str, Any]) -> None:
        """Write one record; `step` numbers it, every other number becomes a TensorBoard scalar."""
        if self.failure is not None:
            return
        with self._noting_failure(METRICS_FILE):
            self._line(METRICS_FILE, record)
            if self._board is not None:
                for name, value in record.items():
                    if name != "step":
                        self._board.add_scalar(name, value, record["step"])
        for name, sink in self._sinks.items():
            with self._noting_sink(name, "write"):
                sink.write(_finite(record))

    def write_curvature(self, record: dict[str, Any], spectra: Mapping[str, Sequence[float]]) -> None:
        """Write one rank's readings at one refresh; spectra become TensorBoard histograms, of log₁₀ λ."""
        if self.failure is not None:
            return
        with self._noting_failure(CURVATURE_FILE):
            self._line(CURVATURE_FILE, record)
            for name, values in spectra.items() if self._board is not None else ():
                logs = [math.log10(value) for value in values if value > 0]
                if logs:
                    self._board.add_histogram(f"log10 eigenvalues/{name}", np.asarray(logs), record["step"])

    def write_pictures(self, step: int, samples: Tensor) -> None:
        """Write samples `[n, ...]` of values in [−1, 1] as `samples/step-<step>.png`, if they are pictures."""
        if self.failure is not None or not is_pictures(tuple(samples.shape)):
            return
        path = self._directory / "samples" / f"step-{step:08d}.png"
        try:
            write_grid(samples.float().numpy(), path)
        except OSError as error:
            self.failure = KFACError(f"can't write {path}: {error.strerror}")

    def close(self) -> None:
        """Flush and close all files, and the sinks."""
        self._close_files()
        for name, sink in self._sinks.items():
            before = self.failure
            with self._noting_sink(name, "close"):
                sink.close()
            if self.failure is not before:  # it is out of date
                warnings.warn(str(self.failure), stacklevel=2)

    def _close_files(self) -> None:
        for stream in self._streams.values():
            with suppress(OSError):  # `failure` holds the error of a full disk
                stream.close()
        if self._board is not None:
            with suppress(OSError):
                self._board.close()

    def _line(self, name: str, record: dict[str, Any]) -> None:
        self._streams[name].write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._streams[name].flush()

    @contextmanager
    def _noting_failure(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = KFACError(f"can't write {self._directory / name}: {error.strerror}")

    @contextmanager
    def _noting_sink(self, name: str, method: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:  # the user's own code may raise anything, and no rank may stop alone
            failure = f"metrics.sinks.{name}: its {method} raises {type(error).__name__}: {error}"
            self.failure = self.failure or KFACError(failure)


def _finite(value: Any) -> Any:
    """Return a record with null in place of NaN and infinities, which JSON hasn't: a condition number may be one."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {name: _finite(part) for name, part in value.items()}
        case list() | tuple():
            return [_finite(part) for part in value]
    return value


def _continued(path: Path, last_step: int) -> TextIO:
    """Open a file of records to append to, with those up to the last step that a resumed run has done."""
    kept = [record for record in read_metrics(path) if record["step"] <= last_step]
    rewritten = path.with_suffix(".rewritten")
    rewritten.write_text("".join(json.dumps(record) + "\n" for record in kept))
    rewritten.replace(path)
    return path.open("a")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a `metrics.jsonl`; a last line that a kill tore is left out, and no file is no records.

    Raises:
        KFACError: It can't be read, or a line is no record: names the line.
    """
    if not os.path.lexists(path):
        return []
    if not path.is_file():
        raise KFACError(f"{path}: is no regular file: move it away")
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise KFACError(f"{path}: can't be read: {error.strerror}") from error
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            reason = "no UTF-8 text" if isinstance(error, UnicodeDecodeError) else "no JSON"
            raise KFACError(_no_record(path, number, reason)) from error
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise KFACError(_no_record(path, number, "no JSON object with a step"))
        records.append(record)
    return records


def _no_record(path: Path, number: int, reason: str) -> str:
    return f"{path}:{number}: {reason}: remove the line, or move the file away, and with it what was logged"


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that this process held: on the GPU if it trains there, else resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _tensorboard(directory: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # an extra: metrics.jsonl holds the same numbers
        return None
    return SummaryWriter(str(directory), purge_step=first_step + 1 if first_step else None)
