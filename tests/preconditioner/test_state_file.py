"""K-FAC's state as a file: what one rank can't write or read is told on all of them, and nobody waits."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from kfac_dist import load_kfac, save_kfac
from kfac_dist.errors import CheckpointError
from tests.harness import run_ranks
from tests.preconditioner.workloads import Run

CONFIG = {"curvature": {"factor_every": 1}, "inversion": {"damping": 0.05}}


def said_of(path: Path, *, load: bool, run: Run) -> str:
    try:
        (load_kfac if load else save_kfac)(run.kfac, path)
    except CheckpointError as error:
        return str(error)
    return ""


def saving_and_loading(directory: str) -> list[str]:
    """What a rank is told of: no directory, a whole file, one that rank 1 lacks, one that holds no state."""
    run = Run("mlp", CONFIG)
    run.train(2)
    folder = Path(directory)
    if run.rank == 0:
        (folder / "file").write_text("no directory")
        torch.save(torch.zeros(3), folder / "tensor.pt")
    said = [
        said_of(folder / "file" / "kfac.pt", load=False, run=run),
        said_of(folder / "kfac.pt", load=False, run=run),
        said_of(folder / ("kfac.pt" if run.rank == 0 else "none.pt"), load=True, run=run),
        said_of(folder / "tensor.pt", load=True, run=run),
        said_of(folder / "kfac.pt", load=True, run=run),
    ]
    run.train(1, 2)
    run.close()
    return said


@pytest.mark.parametrize("size", [1, 2])
def test_what_a_rank_can_not_write_or_read_is_told_on_all(size: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        by_rank = run_ranks(size, saving_and_loading, directory)
    for rank, (unwritten, written, lacking, other, loaded) in enumerate(by_rank):
        assert "file/kfac.pt" in unwritten
        assert unwritten.startswith("can't write")
        assert written == loaded == ""
        if size == 1:
            assert lacking == ""
        else:
            assert lacking.startswith(("rank 1: can't read", "can't read")[rank])
            assert "none.pt" in lacking
        assert "it holds a Tensor, no state" in other
