from __future__ import annotations

import os
import re
import socket
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from kfac_dist.distributed.startup.bootstrap import FLIGHT_RECORDER, _record_flights, bootstrap, choose_device
from kfac_dist.distributed.startup.rank_info import Launcher, RankInfo
from kfac_dist.distributed.startup.rendezvous import EPOCH
from kfac_dist.errors import CollectiveError, ConfigError
from tests.harness import run_ranks

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}
TORCHRUN_INFO = RankInfo(
    Launcher.TORCHRUN, rank=1, world_size=4, local_rank=1, local_world_size=2, address=("localhost", 29500)
)


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [
        ("cpu", 8, torch.device("cpu")),
        ("auto", 0, torch.device("cpu")),
        ("auto", 2, torch.device("cuda", 1)),
        ("cuda", 2, torch.device("cuda", 1)),
    ],
)
def test_device_of_a_rank(monkeypatch: pytest.MonkeyPatch, device: str, gpus: int, expected: torch.device) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert choose_device(device, TORCHRUN_INFO) == expected  # type: ignore[arg-type]


def test_a_rank_with_gpus_of_its_own_takes_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("auto", replace(TORCHRUN_INFO, own_gpus=True)) == torch.device("cuda", 0)


def test_cuda_without_enough_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"run\.device: cuda needs a GPU for each of the 2 ranks .* has 1"):
        choose_device("cuda", TORCHRUN_INFO)
    with pytest.raises(ConfigError, match=r"auto finds 1 GPU for the 2 ranks of this node: start 1 rank .*device=cpu"):
        choose_device("auto", TORCHRUN_INFO)  # NCCL takes one rank per GPU


def meet_with(port: int, gpus_by_rank: list[int]) -> str:
    rank, size = int(os.environ["RANK"]), os.environ["WORLD_SIZE"]
    gpus = gpus_by_rank[rank]
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=size)
    with pytest.MonkeyPatch.context() as machine:
        machine.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        machine.setattr(torch.cuda, "device_count", lambda: gpus)
        machine.setattr(torch.cuda, "set_device", lambda device: None)
        with pytest.raises(ConfigError) as caught:
            bootstrap("auto", 20.0)
    return str(caught.value)


@pytest.mark.parametrize(
    ("gpus", "said"),
    [
        ([4, 0, 4], r"backends: nccl on ranks 0, 2 \(4 GPUs on [^,]*\), gloo on rank 1 \(0 GPUs on [^,]*\); leave out"),
        ([0, 2, 4], r"rank 1 on .*: run\.device: auto finds 2 GPUs for the 3 ranks of this node"),
    ],
    ids=["a node without", "fewer than ranks"],
)
def test_ranks_whose_devices_do_not_fit_together_say_so_at_once(gpus: list[int], said: str) -> None:
    for message in run_ranks(3, meet_with, free_port(), gpus, process_group=False):
        assert re.search(said, message), message


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def join(port: int, extra: dict[str, str]) -> tuple[str, int, float, bool]:
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    os.environ.update(LOCAL_RANK=rank, LOCAL_WORLD_SIZE=size, MASTER_ADDR="localhost", MASTER_PORT=str(port), **extra)
    with bootstrap("cpu", 20.0) as world:
        assert (world.rank, world.world_size, world.local_world_size) == (int(rank), int(size), int(size))
        assert (world.device, world.backend) == (torch.device("cpu"), "gloo")
        again = bootstrap("cpu", 20.0)
        again.close()  # not its group to destroy
        total = torch.ones(1)
        dist.all_reduce(total)
        description = world.describe()
    return description, world.local_rank, total.item(), dist.is_initialized()


@pytest.mark.parametrize("size", [1, 2])
def test_ranks_meet_and_part(size: int) -> None:
    results = run_ranks(size, join, free_port(), {}, process_group=False)
    noun = "rank" if size == 1 else "ranks"
    description = f"{size} {noun} on 1 node (environment), gloo on cpu"
    assert results == [(description, rank, float(size), False) for rank in range(size)]


def join_as_task_of_srun(port: int) -> tuple[str, dict[str, str], bool]:
    rank, size = os.environ.pop("RANK"), os.environ.pop("WORLD_SIZE")
    os.environ.update(
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        SLURM_JOB_ID="1",
        SLURM_STEP_ID="0",
        SLURM_STEP_NODELIST="node[1-2]",
        SLURM_STEP_NUM_TASKS=size,
        SLURM_STEP_TASKS_PER_NODE="2,1",
        SLURM_PROCID=rank,
        SLURM_NODEID=str(int(rank) // 2),
        SLURM_LOCALID=str(int(rank) % 2),
    )
    with bootstrap("cpu", 20.0) as world:
        dist.barrier()
        exported = {name: os.environ[name] for name in EXPORTS}
        description = world.describe()
    return description, exported, any(name in os.environ for name in EXPORTS)


EXPORTS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def test_tasks_of_srun_meet_and_show_others_their_place() -> None:
    infos = [("0", "3", "0", "2"), ("1", "3", "1", "2"), ("2", "3", "0", "1")]
    results = run_ranks(3, join_as_task_of_srun, free_port(), process_group=False)
    assert [result[1] for result in results] == [dict(zip(EXPORTS, info, strict=True)) for info in infos]
    assert results[0][0] == "3 ranks on 2 nodes (srun), gloo on cpu"
    assert not any(result[2] for result in results), "what was exported goes with the world"


def meet_after_a_false_start(port: int) -> list[float]:
    """A start that died before it had met has left its epoch and greetings behind, and rank 0 is late."""
    rank, agent = int(os.environ["RANK"]), {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    store = dist.TCPStore("localhost", port, is_master=False)
    if rank == 0:
        store.set(EPOCH, "kfac_dist/dead")
        time.sleep(0.3)
    else:
        store.set(f"kfac_dist/dead/welcome/{rank}", "of a dead rank")
    return [join(port, agent)[2] for _ in range(2)]  # the workers of one start, and those that follow them


def test_restarted_workers_do_not_read_the_dead_ones_addresses() -> None:
    # The agent's store outlives the workers, and agents count their restarts differently: no count is used.
    agent = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    assert run_ranks(3, meet_after_a_false_start, agent.port, process_group=False) == [[3.0, 3.0]] * 3


def test_alone_there_is_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    with bootstrap("cpu", 20.0) as world:
        assert (world.rank, world.world_size, world.local_rank, world.local_world_size) == (0, 1, 0, 1)
        assert not dist.is_initialized()
        assert world.describe() == "1 process on cpu"


def test_ranks_that_never_meet_are_told_where(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (TORCHRUN | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, text)
    with pytest.raises(CollectiveError, match=r"rank 1 of 4 did not meet the others at localhost:\d+ .* within 1 s"):
        bootstrap("cpu", 1.0)


def test_a_host_without_an_address_is_told_without_torch_s_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (TORCHRUN | {"MASTER_ADDR": "node1.invalid"}).items():
        monkeypatch.setenv(name, text)
    with pytest.raises(CollectiveError, match=r"rank 1 of 4 finds no address of 'node1.invalid', .*; set MASTER_ADDR"):
        bootstrap("cpu", 0.5)


def joined_by_others() -> str:
    info = {**TORCHRUN, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(info)
    if dist.get_rank() == 1:
        return str(bootstrap("cpu", 20.0).owns_group)
    with pytest.raises(
        ConfigError, match=r"this process is rank 0 of 2 in torch\.distributed, but rank 1 of 2 in its "
    ):
        bootstrap("cpu", 20.0)
    return ""


def test_group_that_exists_is_used_unless_it_contradicts_the_launcher() -> None:
    assert run_ranks(2, joined_by_others) == ["", "False"]


def test_nccl_writes_down_its_last_collectives_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FLIGHT_RECORDER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    _record_flights()
    assert {name: os.environ[name] for name in FLIGHT_RECORDER} == {
        **FLIGHT_RECORDER,
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    }
    for name in FLIGHT_RECORDER:  # monkeypatch knows only what was there
        os.environ.pop(name)
