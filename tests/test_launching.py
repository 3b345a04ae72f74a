from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer.core
import typer.main

from kfac_dist import launching
from kfac_dist.cli import app
from kfac_dist.errors import ConfigError
from kfac_dist.launching import Command, LauncherName, launch_command, overrides_in

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "digits_autoencoder.yaml"


@pytest.mark.parametrize(
    ("launcher", "words"),
    [
        (LauncherName.TORCHRUN, ("bash", str(ROOT / "launch" / "torchrun.sh"))),
        (LauncherName.MPI, ("bash", str(ROOT / "launch" / "mpirun.sh"))),
        (LauncherName.MPIRUN, ("bash", str(ROOT / "launch" / "mpirun.sh"))),
        (LauncherName.DEEPSPEED, ("bash", str(ROOT / "launch" / "deepspeed.sh"))),
        (LauncherName.SLURM, (sys.executable, "-m", "kfac_dist", "submit")),
    ],
)
def test_each_launcher_has_its_script(launcher: LauncherName, words: tuple[str, ...]) -> None:
    command = launch_command(launcher, CONFIG, ["-n", "2", "train.steps=3"])
    assert command == Command((*words, str(CONFIG), "-n", "2", "train.steps=3"), {"PYTHON": sys.executable})


def test_an_installed_package_has_its_scripts_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "kfac_dist"
    (package / "launch").mkdir(parents=True)
    (package / "launch" / "torchrun.sh").touch()
    monkeypatch.setattr(launching, "__file__", str(package / "launching.py"))

    assert launch_command(LauncherName.TORCHRUN, CONFIG, []).words[1] == str(package / "launch" / "torchrun.sh")
    with pytest.raises(ConfigError, match=r"mpirun\.sh is neither .*kfac_dist/launch/mpirun\.sh nor .*: install"):
        launch_command(LauncherName.MPI, CONFIG, [])


def test_overrides_are_told_from_options() -> None:
    assert overrides_in(["-n", "2", "train.steps=3", "--nnodes=2", "--dry-run", "a=b=c"]) == ["train.steps=3", "a=b=c"]


def test_values_of_options_are_no_overrides() -> None:
    setup = ["--setup", "export NCCL_DEBUG=INFO", "--option", "qos=high", "--setup=A=b", "--quiet", "run.seed=1"]
    assert overrides_in([*setup, "x y=3", "--name", "a=b", "model.args.hidden-dim=2"]) == [
        "run.seed=1",
        "model.args.hidden-dim=2",
    ]


@pytest.mark.parametrize("name", ["submit", "train"])
def test_options_without_a_value_are_known(name: str) -> None:
    commands = typer.main.get_command(app)
    assert isinstance(commands, typer.core.TyperGroup)
    for option in commands.commands[name].params:
        if isinstance(option, typer.core.TyperOption):
            known = launching._FLAGS.issuperset(option.opts)
            assert known == option.is_flag, option.opts


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kfac_dist", "launch", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_launch_becomes_the_script() -> None:
    arguments = ["configs/digits_autoencoder.yaml", "--nproc-per-node", "2", "train.steps=3", "--quiet", "--dry-run"]
    script = subprocess.run(
        ["bash", str(ROOT / "launch" / "torchrun.sh"), *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    ended = launch("--with", "torchrun", *arguments)

    assert (ended.returncode, ended.stdout) == (0, script.stdout)
    assert "train.steps=3 --quiet" in ended.stdout


def test_launch_with_slurm_submits() -> None:
    ended = launch("--with", "slurm", str(CONFIG), "--nodes", "2", "run.name=seven", "--dry-run")

    assert (ended.returncode, ended.stderr) == (0, "")
    assert "#SBATCH --nodes=2" in ended.stdout
    assert "#SBATCH --job-name=seven" in ended.stdout


def test_launch_with_slurm_lets_srun_start_the_ranks() -> None:
    setup = "export NCCL_DEBUG=INFO"
    ended = launch("--with", "slurm", str(CONFIG), "--started-by", "srun", "--setup", setup, "--dry-run")

    assert (ended.returncode, ended.stderr) == (0, "")
    assert setup in ended.stdout
    assert "torch.distributed.run" not in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--with", "mpi", "-n", "2", str(CONFIG)], "error: found '-n', expected a configuration"),
        (["--with", "mpi", str(CONFIG), "-n", "2", "train.stepz=3"], "train.stepz: unknown key"),
        (["--with", "pdsh", str(CONFIG)], "pdsh"),
    ],
)
def test_mistakes_are_told_before_anything_starts(arguments: list[str], message: str) -> None:
    ended = launch(*arguments)

    assert (ended.returncode, ended.stdout) == (2, "")
    assert message in ended.stderr
