"""The wheel by itself, away from the checkout: what a new user has after `pip install kfac_dist`."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="hatchling is not installed: pip install 'kfac_dist[dev]'")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's files, as an installer unpacks them."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        timeout=250,
        check=True,
    )
    (wheel,) = folder.glob("kfac_dist-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site-packages")
    return folder / "site-packages"


def kfac_dist(installed: Path, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kfac_dist", *arguments],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


@pytest.mark.parametrize(
    ("packed", "source"),
    [("configs", "configs/*.yaml"), ("launch", "launch/*.sh"), ("slurm/scripts", "slurm/*.sbatch")],
)
def test_the_wheel_has_what_commands_look_for(installed: Path, packed: str, source: str) -> None:
    expected = sorted(file.name for file in ROOT.glob(source))

    assert sorted(file.name for file in (installed / "kfac_dist" / packed).iterdir()) == expected
    assert len(expected) >= 2
    assert not (installed / "tests").exists()


def test_a_new_user_gets_from_a_name_to_a_run(installed: Path, tmp_path: Path) -> None:
    where = [sys.executable, "-c", "import kfac_dist; print(kfac_dist.__file__)"]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == str(installed / "kfac_dist" / "__init__.py")

    written = kfac_dist(installed, tmp_path, "init", "digits_autoencoder", "--out", "mine.yaml")
    assert (written.returncode, written.stderr) == (0, "")
    # The launch script is the packed one, too.
    launched = kfac_dist(
        installed, tmp_path, *("launch", "--with", "torchrun", "mine.yaml", "--nproc-per-node", "1"),
        *("train.steps=4", "run.device=cpu", "--quiet"),
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    assert (tmp_path / "runs/digits-autoencoder/checkpoints/step-00000004/manifest.json").exists()

    refused = kfac_dist(installed, tmp_path, "train", "digits_autoencoderr")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: digits_autoencoderr: no such file, and no shipped run has that name; did")
    planned = kfac_dist(installed, tmp_path, "plan", "digits_autoencoder_ekfac")  # which includes another
    assert planned.returncode == 0, planned.stderr
