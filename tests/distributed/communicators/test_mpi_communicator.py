from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from kfac_dist.config.schema import Backend
from kfac_dist.distributed.communicators.build import build_communicator
from kfac_dist.distributed.startup.mpi import import_mpi
from kfac_dist.errors import ConfigError
from tests.harness import run_ranks

ROOT = Path(__file__).parents[3]
MPIRUN = Path(sys.executable).parent / "mpirun"

needs_mpi4py = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None, reason="needs pip install 'kfac_dist[mpi]'"
)
needs_mpirun = pytest.mark.skipif(
    not MPIRUN.exists() or importlib.util.find_spec("mpi4py") is None,
    reason="needs mpirun and mpi4py beside the interpreter (pip install mpich 'kfac_dist[mpi]')",
)


def mpirun(ranks: int, function: str, directory: Path) -> tuple[subprocess.CompletedProcess[str], dict[int, Any]]:
    ended = subprocess.run(
        [MPIRUN, "-n", str(ranks), sys.executable, "-m", "tests.distributed.mpi_job", function, directory],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    results = {int(file.name): pickle.loads(file.read_bytes()) for file in directory.iterdir()}
    return ended, results


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What three ranks found over MPI and over gloo."""
    ended, results = mpirun(3, "compare", tmp_path_factory.mktemp("compare"))
    assert ended.returncode == 0, ended.stderr
    return [results[rank] for rank in range(3)]


@needs_mpirun
def test_ranks_of_mpirun_meet_by_themselves(both: list[dict[str, Any]]) -> None:
    assert [result["world"] for result in both] == ["3 ranks on 1 node (mpirun), gloo on cpu"] * 3
    assert [result["place"] for result in both] == [(rank, rank, 3) for rank in range(3)]


@needs_mpirun
def test_collectives_equal_gloo_s(both: list[dict[str, Any]]) -> None:
    for result in both:
        mpi, gloo = result["collectives mpi"], result["collectives torch"]
        assert (mpi["kind"], gloo["kind"]) == ("MPICommunicator", "TorchCommunicator")
        for name, tensor in mpi["tensors"].items():
            # Sums of three round in another order; what only moves must not round at all.
            tolerance = 2 * torch.finfo(tensor.dtype).eps if "sum" in name and tensor.is_floating_point() else 0.0
            torch.testing.assert_close(tensor, gloo["tensors"][name], rtol=min(tolerance, 0.02), atol=0.0, msg=name)
            if tensor.dtype == torch.float32:
                torch.testing.assert_close(tensor, gloo["tensors"][name], rtol=1e-6, atol=0.0, msg=name)
        assert all(mpi["same"])
        assert mpi["objects"] == gloo["objects"] == [{"rank": rank, "text": "x" * rank} for rank in range(3)]
        assert mpi["traffic"] == gloo["traffic"]


@needs_mpirun
def test_splits_equal_gloo_s(both: list[dict[str, Any]]) -> None:
    for result in both:
        assert result["splits mpi"] == result["splits torch"]


@needs_mpirun
@pytest.mark.parametrize(
    ("configuration", "tolerance"),
    [("replicated", 1e-6), ("owner", 1e-6), ("bf16", 0.05)],  # in bf16 three summands round by their order
)
def test_kfac_over_mpi_takes_gloo_s_steps(both: list[dict[str, Any]], configuration: str, tolerance: float) -> None:
    for result in both:
        over_mpi, over_gloo = result[f"{configuration} mpi"], result[f"{configuration} torch"]
        assert over_mpi.keys() == over_gloo.keys()
        for name, parameter in over_mpi.items():
            error = (parameter - over_gloo[name]).norm() / over_gloo[name].norm()
            assert error <= tolerance, (name, error)


@needs_mpirun
def test_what_can_t_work_is_refused(both: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(both):
        shards, factors, groups, *half = result["refused"]
        assert shards.startswith("all_to_all of shards: splits [1, 2, 0] and [1, 1, 0] don't add up")
        assert factors.startswith("all_reduce of factors: kfac.distribution.backend: mpi is for tensors on the CPU")
        assert groups == "groups [[0, 1]] are no partition of ranks 0 to 2"
        assert half == ([] if rank == 0 else [f"{rank - 1} of 2: 3.0"])


@needs_mpirun
def test_a_rank_that_stays_away_is_told_and_the_job_ends(tmp_path: Path) -> None:
    began = time.monotonic()
    ended, results = mpirun(2, "stay_away", tmp_path)

    assert time.monotonic() - began < 40.0  # rank 1 would sleep for a minute
    assert ended.returncode != 0
    message = results[0]["message"]
    assert message.startswith("rank 0 of 2: all_reduce of factors (20 bytes) failed after 1.")
    assert "over MPI: another rank has stopped, is late, or runs another collective" in message
    assert message in ended.stderr
    assert results[0]["seconds"] < 5.0


def without_mpirun() -> str:
    with pytest.raises(ConfigError) as caught:
        build_communicator(20.0, None, Backend.MPI)
    return str(caught.value)


@needs_mpi4py
def test_ranks_that_mpi_does_not_know_are_told_what_to_do() -> None:
    (message, _) = run_ranks(2, without_mpirun)
    assert message.startswith("kfac.distribution.backend: mpi needs ranks that mpirun has started")
    assert "torch.distributed has 2 ranks: start with launch/mpirun.sh, or write backend: torch" in message


def test_a_missing_mpi4py_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ConfigError, match=r"mpirun needs mpi4py, .*: pip install 'kfac_dist\[mpi\]'"):
        import_mpi("mpirun")


def started_by_another_mpirun() -> str:
    from kfac_dist.distributed.startup.bootstrap import bootstrap

    for name in ("RANK", "WORLD_SIZE"):
        del os.environ[name]
    os.environ.update(OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_SIZE="2")
    with pytest.raises(ConfigError) as caught:
        bootstrap("cpu", 5.0)
    return str(caught.value)


@needs_mpi4py
def test_an_mpirun_of_another_mpi_is_told() -> None:
    (message,) = run_ranks(1, started_by_another_mpirun, process_group=False)
    assert message.startswith(
        "mpirun started this process as rank 1 of 2, but mpi4py sees rank 0 of 1: it uses another"
    )


def test_one_process_needs_no_mpi() -> None:
    assert build_communicator(20.0, None, Backend.MPI).size == 1
