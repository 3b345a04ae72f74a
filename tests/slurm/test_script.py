"""The rendered scripts: compared with files, checked by shellcheck, and run with stand-ins for SLURM's commands."""

from __future__ import annotations

import difflib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kfac_dist.slurm.job import Container, SlurmJob, StartedBy
from kfac_dist.slurm.script import render, template

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
RUN = Path("my runs/run")

JOBS: dict[str, tuple[SlurmJob, Path | None]] = {
    "train.sbatch": (SlurmJob(nodes=4, gpus_per_node=8, time="4:00:00", partition="gpu"), None),
    "train_srun.sbatch": (
        SlurmJob(
            nodes=2,
            ranks_per_node=4,
            cpus_per_task=2,
            memory="64G",
            account="physics",
            started_by=StartedBy.SRUN,
            container=Container(image="site/kfac-dist:1", mounts="/scratch:/scratch"),
            setup="module load 'cuda'",
            options=("--qos=high",),
        ),
        None,
    ),
    "sweep.sbatch": (
        SlurmJob(gpus_per_node=1, max_restarts=0, container=Container(apptainer="kfac-dist.sif")),
        RUN / "sweep.txt",
    ),
}


def rendered(name: str) -> str:
    job, sweep = JOBS[name]
    return render(
        template(job.started_by),
        job,
        config=RUN / "job.yaml",
        run_directory=RUN,
        python="/opt/venv/bin/python",
        sweep=sweep,
        tasks=3 if sweep else 0,
    )


@pytest.mark.parametrize("name", JOBS)
def test_rendered_scripts_are_the_reviewed_ones(name: str) -> None:
    """After a wanted change: `python -m tests.slurm.test_script` writes the files anew."""
    expected = (GOLDEN / name).read_text().splitlines()
    assert list(difflib.unified_diff(expected, rendered(name).splitlines(), lineterm="")) == []


@pytest.mark.parametrize("path", [*sorted((ROOT / "slurm").glob("*.sbatch")), *sorted(GOLDEN.glob("*.sbatch"))])
def test_scripts_are_clean(path: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck is not None, "the dev extra brings shellcheck"
    # A rendered script compares what is fixed by now.
    checks = [] if path.parent != GOLDEN else ["--exclude=SC2050,SC2157,SC2194"]
    subprocess.run([shellcheck, *checks, str(path)], check=True)


@pytest.mark.parametrize("path", sorted((ROOT / "slurm").glob("*.sbatch")), ids=lambda path: path.name)
def test_a_setup_may_read_variables_that_are_not_set(tmp_path: Path, path: Path) -> None:
    """As `module load` and conda's hooks do. A command of it that fails still ends the job."""
    code, said = run_script(path, tmp_path, "a.yaml", SETUP='echo "set up$NOBODY_SETS_THIS"')
    assert said.startswith("set up\n"), said
    assert "NOBODY_SETS_THIS" not in said
    code, said = run_script(path, tmp_path, "a.yaml", SETUP="echo set up; false; echo not reached")
    assert (code, said) == (1, "set up\n")


def test_both_scripts_stop_and_requeue_alike() -> None:
    """From the first line after the command on, they are the same text."""
    tails = [template(started_by).partition("\necho ")[2] for started_by in StartedBy]
    assert tails[0] == tails[1]
    assert "scontrol requeue" in tails[0]


STUBS = {
    # Prints its arguments, one a line; a signal to it is what the ranks would get.
    "srun": 'printf "%s\\n" "$@"; echo "OMP_NUM_THREADS=$OMP_NUM_THREADS"; '
    'echo "SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK-all}"; '
    'echo "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$TORCH_ELASTIC_SHUTDOWN_TIMEOUT"; exit ${SRUN_CODE:-0}',
    "scontrol": 'echo "scontrol $*"',
}


def run_script(path: Path, directory: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Run a batch script as SLURM would, with its commands replaced by ones that print."""
    commands = directory / "commands"
    commands.mkdir(exist_ok=True)
    for name, body in STUBS.items():
        (commands / name).write_text(f"#!/bin/sh\n{body}\n")
        (commands / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "HOSTNAME": "n1"}
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    ended = subprocess.run(
        ["bash", str(path), *arguments],
        env={**kept, **slurm, **environment, "PATH": f"{commands}:{kept['PATH']}"},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return ended.returncode, ended.stdout + ended.stderr


def test_an_array_task_trains_with_its_line_of_the_sweep(tmp_path: Path) -> None:
    script = tmp_path / "sweep.sbatch"
    script.write_text(rendered("sweep.sbatch"))
    (tmp_path / RUN).mkdir(parents=True)
    (tmp_path / RUN / "sweep.txt").write_text('train.steps=1\n"optimizer.betas=[0.9, 0.99]" run.seed=3\n')
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "1", "SLURM_GPUS_ON_NODE": "1"}

    code, said = run_script(script, tmp_path, **array)

    assert code == 0
    words = said.splitlines()
    assert "job 5_1 on n[1-2]" in words[0]
    start = words.index("apptainer")
    assert words[start : start + 3] == ["apptainer", "exec", "--nv"]
    train = words.index("train")
    assert words[train + 1 : train + 8] == [
        "my runs/run/job.yaml",
        "--resume",
        "auto",
        "run.directory=my runs",
        "run.name=run-1",
        "optimizer.betas=[0.9, 0.99]",
        "run.seed=3",
    ]
    code, said = run_script(script, tmp_path, **{**array, "SLURM_ARRAY_TASK_ID": "2"})
    assert (code, "no line for task 2" in said) == (2, True)


@pytest.mark.parametrize("name", ["train.sbatch", "train_srun.sbatch"])
def test_by_hand_arguments_and_variables_say_what_to_run(tmp_path: Path, name: str) -> None:
    script = ROOT / "slurm" / name
    code, said = run_script(script, tmp_path)
    assert (code, "give a configuration" in said) == (2, True)

    code, said = run_script(
        script,
        tmp_path,
        "a.yaml",
        "x=1 2",
        RANKS_PER_NODE="2",
        SLURM_CPUS_PER_TASK="6",
        SETUP="echo set up",
        SRUN_CODE="3",
    )
    assert code == 3, "the ranks' own"
    words = said.splitlines()
    assert words[0] == "set up"
    assert words[words.index("train") + 1 :][:4] == ["a.yaml", "--resume", "auto", "x=1 2"]
    if name == "train.sbatch":
        assert {"--ntasks=2", "--nproc-per-node=2", "OMP_NUM_THREADS=3", "--rdzv-endpoint=n1:12287"} <= set(words)
    else:
        assert {"--ntasks=4", "--ntasks-per-node=2", "OMP_NUM_THREADS=6"} <= set(words)


@pytest.mark.parametrize("name", ["train.sbatch", "train_srun.sbatch"])
@pytest.mark.parametrize(
    ("cpus", "expected"),
    [
        ({"SLURM_CPUS_ON_NODE": "9"}, {"SRUN_CPUS_PER_TASK=all", "OMP_NUM_THREADS=4"}),
        ({"SLURM_CPUS_ON_NODE": "1"}, {"SRUN_CPUS_PER_TASK=all", "OMP_NUM_THREADS=1"}),
        ({"SLURM_CPUS_ON_NODE": "9", "OMP_NUM_THREADS": "3"}, {"SRUN_CPUS_PER_TASK=all", "OMP_NUM_THREADS=3"}),
        ({"SLURM_CPUS_ON_NODE": "64", "SLURM_CPUS_PER_TASK": "6"}, {"SRUN_CPUS_PER_TASK=6"}),
    ],
)
def test_ranks_share_the_cores_of_their_node(
    tmp_path: Path, name: str, cpus: dict[str, str], expected: set[str]
) -> None:
    """Without --cpus-per-task srun is told no number, which gives its tasks all cores that the job has."""
    code, said = run_script(ROOT / "slurm" / name, tmp_path, "a.yaml", RANKS_PER_NODE="2", **cpus)
    assert code == 0
    assert expected <= set(said.splitlines())


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({}, 110),
        ({"STOP_SECONDS": "900"}, 600),
        ({"STOP_SECONDS": "20"}, 30),
        ({"STOP_SECONDS": "900", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "45"}, 45),
    ],
)
def test_agents_let_ranks_save_for_nearly_as_long_as_there_is(
    tmp_path: Path, variables: dict[str, str], seconds: int
) -> None:
    """By themselves they kill ranks 30 s after SIGTERM; two steps may take longer."""
    code, said = run_script(ROOT / "slurm/train.sbatch", tmp_path, "a.yaml", **variables)
    assert (code, f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT={seconds}" in said.splitlines()) == (0, True), said


@pytest.mark.parametrize("name", ["train.sbatch", "train_srun.sbatch"])
@pytest.mark.parametrize(
    ("overrides", "variables", "expected"),
    [
        (["train.steps=3"], {}, ["--resume", "auto", "train.steps=3"]),
        (["checkpoint.resume=runs/a/checkpoints/step-00000010"], {}, []),
        (["checkpoint={every: 5, resume: never}"], {}, []),
        (["train.steps=3"], {"RESUME": ""}, ["train.steps=3"]),
        (["train.steps=3"], {"RESUME": "my runs/a"}, ["--resume", "my runs/a", "train.steps=3"]),
    ],
)
def test_where_a_run_is_told_to_start_from_wins(
    tmp_path: Path, name: str, overrides: list[str], variables: dict[str, str], expected: list[str]
) -> None:
    code, said = run_script(ROOT / "slurm" / name, tmp_path, "a.yaml", *overrides, **variables)
    words = said.splitlines()
    start = words.index("a.yaml") + 1
    assert (code, words[start : start + max(len(expected), 1)]) == (0, expected or overrides)


if __name__ == "__main__":
    for golden in JOBS:
        (GOLDEN / golden).write_text(rendered(golden))
