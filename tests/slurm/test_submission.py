"""`kfac-dist submit`: everything is checked before SLURM is asked; `test_cluster.py` asks it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kfac_dist.cli import app
from kfac_dist.config.yaml.load import dump_yaml, load_config
from kfac_dist.errors import ConfigError
from kfac_dist.reporting.run_lock import RunLock
from kfac_dist.slurm.job import SlurmJob
from kfac_dist.slurm.submission import SubmissionError, prepare, submit, submitted
from tests.slurm.commands import NO_SUCH_JOB, install
from tests.training.runs import small_config

RECORD = {
    "state": "finished", "reason": "", "step": 12, "total_steps": 12, "ranks": 1, "host": "h", "pid": 1, "job": None,
    "restarts": 0, "changed": 0.0,
}  # fmt: skip


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    file = tmp_path / "run.yaml"
    file.write_text(dump_yaml(small_config(tmp_path / "runs")))
    return str(file)


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["submit", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_a_run_that_goes_on_is_left_alone(run_file: str, tmp_path: Path) -> None:
    with RunLock(tmp_path / "runs/small"):
        code, said = invoke(run_file, "--dry-run")
        assert code == 2
        assert f"{tmp_path}/runs/small is in use by process {os.getpid()} on " in said
    assert invoke(run_file, "--dry-run")[0] == 0


def test_a_dry_run_prints_the_script_and_leaves_nothing(run_file: str, tmp_path: Path) -> None:
    resources = ["--nodes", "4", "--gpus-per-node", "8", "--time", "4:00:00"]
    code, script = invoke(run_file, *resources, "--name", "other", "--dry-run", "run.seed=9")
    assert code == 0
    assert (
        script
        == prepare(
            load_config(run_file, ["run.name=other", "run.seed=9"]), SlurmJob(nodes=4, gpus_per_node=8, time="4:00:00")
        ).script
    )
    assert "#SBATCH --job-name=other\n#SBATCH --nodes=4\n#SBATCH --time=4:00:00\n#SBATCH --gpus-per-node=8\n" in script
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.step=3"], "train.step: unknown key; did you mean 'steps'?"),
        (["model.name=transfomer"], "model"),
        (["--time", "4h"], "--time: found '4h', expected minutes"),
        (["--sweep", "nowhere.txt"], "--sweep nowhere.txt: can't be read"),
        (["--sweep", "/dev/zero"], "--sweep /dev/zero: is a device, expected a regular file"),
    ],
)
def test_mistakes_are_told_before_the_job_waits(run_file: str, arguments: list[str], message: str) -> None:
    code, said = invoke(run_file, *arguments)
    assert (code, message in said) == (2, True), said


def test_each_line_of_a_sweep_is_checked(run_file: str, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("# two and a typo\n\ntrain.steps=5\nrun.seed=1 optimizer.lrr=1\noptimizer.lr='\n")
    code, said = invoke(run_file, "--sweep", str(sweep))
    assert code == 2
    assert f"{sweep}:4: command line (optimizer.lrr=1): optimizer.lrr: unknown key; did you mean 'lr'?" in said
    assert f"{sweep}:5: No closing quotation" in said
    sweep.write_text("train.steps=5\n# none\n  run.seed=1  train.steps=6\n")
    submission = prepare(load_config(run_file), SlurmJob(), sweep)
    assert submission.sweep == ("train.steps=5", "run.seed=1  train.steps=6")
    assert "#SBATCH --array=0-1\n" in submission.script
    sweep.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="no line has overrides"):
        prepare(load_config(run_file), SlurmJob(), sweep)


@pytest.mark.parametrize(
    ("resume", "setting"), [("auto", "auto"), ("never", "auto"), ("runs/a/checkpoints/step-00000010", "''")]
)
def test_a_checkpoint_to_start_from_is_the_configurations_word(run_file: str, resume: str, setting: str) -> None:
    """`--resume auto` would win over it; without one, a run that is submitted again goes on."""
    submission = prepare(load_config(run_file, [f"checkpoint.resume={resume}"]), SlurmJob())
    assert f"  resume: {resume}\n" in submission.configuration
    assert f"\nresume={setting}\n" in submission.script


def test_a_finished_run_is_not_submitted_again(run_file: str, tmp_path: Path) -> None:
    directory = tmp_path / "runs/small"
    directory.mkdir(parents=True)
    (directory / "state.json").write_text(json.dumps(RECORD))
    with pytest.raises(ConfigError, match=r"holds a finished run of 12 steps.*give another --name"):
        prepare(load_config(run_file), SlurmJob())
    (directory / "state.json").write_text(json.dumps({**RECORD, "state": "preempted"}))
    prepare(load_config(run_file), SlurmJob())


@pytest.mark.parametrize(
    ("submitted_job", "recorded", "squeue", "busy"),
    [
        ("17", None, "echo PENDING", "17, which SLURM says is PENDING"),
        ("17", None, "echo RUNNING", "17, which SLURM says is RUNNING"),
        ("17", None, "echo COMPLETED; echo PENDING", "17, which SLURM says is PENDING"),  # an array's tasks
        ("17", ("failed", "17"), "echo COMPLETING", "17, which SLURM says is COMPLETING"),
        ("17", ("running", "18"), f"case $* in *18*) echo RUNNING ;; *) {NO_SUCH_JOB} ;; esac", "18, which SLURM says"),
        (None, ("running", "18"), "echo RUNNING", "18, which SLURM says is RUNNING"),
        (None, ("preempted", "18"), "echo PENDING", "18, which SLURM says is PENDING"),
        (None, ("preempted", "18"), "echo RUNNING", None),  # in an allocation that is used for this and that
        (None, ("failed", "18"), "echo RUNNING", None),
        ("17", ("running", "17"), "echo CANCELLED", None),
        ("17", ("running", "17"), NO_SUCH_JOB, None),
        ("17", ("running", "17"), None, None),
    ],
)
def test_a_run_is_not_submitted_while_its_job_waits_or_runs(
    run_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    submitted_job: str | None,
    recorded: tuple[str, str] | None,
    squeue: str | None,
    busy: str | None,
) -> None:
    """The new configuration would reach the job that waits, and two jobs would write into one directory."""
    directory = tmp_path / "runs/small"
    directory.mkdir(parents=True)
    install(tmp_path, monkeypatch, squeue=squeue)
    if submitted_job is not None:
        (directory / "job.json").write_text(json.dumps({"job": submitted_job, "submitted": 0.0, "tasks": 0}))
    if recorded is not None:
        state, job = recorded
        (directory / "state.json").write_text(json.dumps({**RECORD, "state": state, "job": job}))
    if busy is None:
        prepare(load_config(run_file), SlurmJob())
    else:
        number = busy.partition(",")[0]
        with pytest.raises(ConfigError, match=rf"belongs to job {busy}.*scancel {number}, or give another --name"):
            prepare(load_config(run_file), SlurmJob())


def test_without_slurm_it_says_so(run_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SubmissionError, match="sbatch: not found; submit from a login node"):
        submit(prepare(load_config(run_file), SlurmJob()))
    assert submitted(tmp_path / "runs/small") is None
