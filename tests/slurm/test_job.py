"""What sbatch would refuse is refused before, with what to write instead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kfac_dist.errors import ConfigError
from kfac_dist.slurm.job import Container, SlurmJob, StartedBy, seconds_of


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("4:00:00", 14400),
        ("2-12", 216000),
        ("1-0:30", 88200),
        ("1-02:03:04", 93784),
        ("0-00:05", 300),
    ],
)
def test_times_are_read_as_slurm_reads_them(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds
    SlurmJob(time=time).check()


@pytest.mark.parametrize("time", ["4h", "4:00:00:00", "1:2:3", "1:60", "", "-4", "4.5", "infinite", "2-", "1-2-3"])
def test_other_times_are_refused(time: str) -> None:
    with pytest.raises(ConfigError, match=r"--time: found .*, expected minutes, .* such as 4:00:00 or 2-12"):
        SlurmJob(time=time).check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time": "2"}, "--time 2 is 120 s, but the run is signalled to stop 120 s before that"),
        ({"memory": "64 GB"}, "--mem: found '64 GB', expected a number and K, M, G or T"),
        ({"container": Container(image="a", apptainer="b")}, "give one of the two"),
        ({"gpus_per_node": 2, "ranks_per_node": 4}, "--ranks-per-node 4 has no GPU for each on 2 GPUs a node"),
        ({"options": ("--qos=high", "qos=high")}, "--option: found 'qos=high', expected an option of sbatch"),
    ],
)
def test_what_cannot_run_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SlurmJob(), **change).check()  # type: ignore[arg-type]


def test_directives_ask_for_what_the_launcher_needs() -> None:
    job = SlurmJob(nodes=4, gpus_per_node=8, memory="64G", account="physics", options=("--qos=high",))
    torchrun = job.directives("run", Path("out"), None)
    assert "--ntasks-per-node=1" in torchrun
    assert {"--mem=64G", "--account=physics", "--qos=high", "--gpus-per-node=8", "--nodes=4"} <= set(torchrun)
    assert not any(option.startswith(("--array", "--partition")) for option in torchrun)
    srun = replace(job, started_by=StartedBy.SRUN).directives("run", Path("out"), 3)
    assert {"--ntasks-per-node=8", "--array=0-2"} <= set(srun)
    assert "--gpus-per-node=0" not in SlurmJob().directives("run", Path("out"), None)
