"""The images: linted, composed, and built for real where someone asks for it (CONTRIBUTING.md says how)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())


def compose_command() -> list[str] | None:
    """Docker's plugin, or the program that came before it."""
    docker = shutil.which("docker")
    if docker and subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0:
        return [docker, "compose"]
    return [program] if (program := shutil.which("docker-compose")) else None


@pytest.mark.parametrize("name", DOCKERFILES)
def test_image_builds_are_clean(name: str) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    assert hadolint.exists(), "the dev extra brings hadolint"
    ended = subprocess.run([str(hadolint), str(DOCKER / name)], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_run_as_a_user_pass_signals_and_can_be_asked(name: str) -> None:
    text = (DOCKER / name).read_text()
    final = text[text.rindex("\nFROM ") :]
    assert 'ENTRYPOINT ["/usr/bin/tini", "--"]' in final
    assert re.search(r"^USER 10001$", final, re.MULTILINE)
    assert re.search(r'^HEALTHCHECK .* CMD \["healthy", "/home/kfac/runs"\]$', final, re.MULTILINE)
    # A run that is stopped has as long as compose gives it, also where torchrun itself is the container's command.
    (seconds,) = re.findall(r"\bTORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", final)
    assert {node["stop_grace_period"] for node in COMPOSE["services"].values()} == {f"{seconds}s"}
    # What changes often is copied after what takes long.
    build = text[: text.rindex("\nFROM ")]
    assert build.index("COPY pyproject.toml") < build.index("pip install") < build.index("COPY . .")
    for package in re.findall(r"'([^'=]+=[^']*)'|no-install-recommends (\w\S*)", final):
        assert package[0], f"{package[1]} has no version"


def test_what_images_copy_is_not_ignored() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source
        for name in DOCKERFILES
        for line in re.findall(r"^COPY (?!--from)(.*)$", (DOCKER / name).read_text(), re.MULTILINE)
        for source in line.removeprefix("--chown=kfac:kfac ").split()[:-1]
        if source != "."
    }
    packed = {"launch", "slurm", "kfac_dist", "README.md", "LICENSE"}  # by pyproject.toml
    assert copied | packed == kept
    assert all((ROOT / path).exists() for path in kept)


def test_two_containers_make_one_run() -> None:
    first, second = COMPOSE["services"].values()
    assert first["command"] == second["command"]
    options = dict(word.removeprefix("--").split("=", 1) for word in first["command"] if word.startswith("--"))
    assert options["nnodes"] == "2"
    assert options["rdzv-endpoint"].partition(":")[0] == first["hostname"] == "node0"
    assert first["command"][:3] == ["kfac-dist", "launch", "--with=torchrun"]
    assert "--resume=auto" in first["command"]
    command = compose_command()
    if command is None:
        pytest.skip("the rest needs docker compose (Debian: docker-compose)")
    # Without a daemon: the schema, and every variable has a default.
    ended = subprocess.run(
        [*command, "-f", str(DOCKER / "compose.yaml"), "config"],
        env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert yaml.safe_load(ended.stdout)["services"]["node1"]["build"]["args"]["BASE_IMAGE"].startswith("python:3.11")


def healthy(directory: Path, **environment: str) -> tuple[int, str]:
    ended = subprocess.run(
        [str(DOCKER / "healthy.sh"), str(directory)],
        env={**os.environ, "HEALTHY_SECONDS": "100", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return ended.returncode, ended.stdout


def write_state(directory: Path, says: str, age: float = 0) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "state.json").write_text(json.dumps({"state": says}, indent=1))
    os.utime(directory / "state.json", (time.time() - age,) * 2)
    return directory


def test_a_container_is_unhealthy_when_a_run_failed_or_fell_silent(tmp_path: Path) -> None:
    def judged() -> tuple[int, str]:
        return healthy(tmp_path, STARTED=str(int(time.time()) - 2000))

    assert judged() == (0, "")
    write_state(tmp_path / "done", "finished", age=1000)
    running = write_state(tmp_path / "slow", "running", age=1000)
    assert judged()[0] == 1
    (running / "metrics.jsonl").write_text("{}\n")
    assert judged() == (0, "")
    os.utime(running / "metrics.jsonl", (time.time() - 200,) * 2)
    code, said = judged()
    assert (code, "slow/metrics.jsonl: nothing for 200 s" in said or "nothing for 201 s" in said) == (1, True)
    write_state(tmp_path / "slow", "failed")
    assert judged() == (1, f"{tmp_path}/slow/state.json says failed\n")


def test_what_earlier_containers_left_in_the_volume_is_not_judged(tmp_path: Path) -> None:
    write_state(tmp_path / "failed", "failed", age=time.time() - 1)
    write_state(tmp_path / "killed", "running", age=time.time() - 1)
    write_state(tmp_path / "slow.previous", "failed")
    write_state(tmp_path / "slow.previous.12", "failed")
    assert healthy(tmp_path) == (0, "")
    write_state(tmp_path / "ours", "failed")
    assert healthy(tmp_path) == (1, f"{tmp_path}/ours/state.json says failed\n")


@pytest.fixture
def composed() -> Iterator[list[str]]:
    if os.environ.get("DOCKER_TESTS") != "1":
        pytest.skip("takes minutes, a Docker daemon and a base image: DOCKER_TESTS=1 asks for it")
    command = compose_command()
    assert command is not None, "docker compose is missing"
    words = [*command, "-p", "kfac-dist-test", "-f", str(DOCKER / "compose.yaml")]
    yield words
    subprocess.run([*words, "down", "--volumes"], check=False)


@pytest.mark.timeout(1800)
def test_the_cpu_image_trains_in_two_containers(composed: list[str]) -> None:
    """Reads BASE_IMAGE, PIP_EXTRA_INDEX_URL and PIP_FIND_LINKS, as compose.yaml does."""
    build = ["docker", "build", "--network", "host", "-t", "kfac-dist:cpu", "-f", str(DOCKER / "Dockerfile.cpu")]
    for name in ("BASE_IMAGE", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        build += ["--build-arg", f"{name}={os.environ[name]}"] if os.environ.get(name) else []
    subprocess.run([*build, str(ROOT)], env={**os.environ, "DOCKER_BUILDKIT": "1"}, check=True)

    up = subprocess.run(
        [*composed, "up", "--no-build"], env={**os.environ, "STEPS": "30"}, capture_output=True, text=True, check=False
    )

    assert up.returncode == 0, up.stdout + up.stderr
    assert "2 ranks on 2 nodes" in up.stdout
    assert re.search(r"kfac +step 30/30 ", up.stdout)
