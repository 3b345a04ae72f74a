from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kfac_dist.distributed.bootstrap import Place, bootstrap, choose_device, find_place
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
PLACE = Place("torchrun", rank=1, world_size=4, local_rank=1, local_world_size=2, address=("localhost", 29500))


def test_place_from_torchrun() -> None:
    assert find_place({**TORCHRUN, "HOME": "/"}) == PLACE


def test_nobody_launched_is_alone() -> None:
    assert find_place({"LOCAL_RANK": "0"}) == Place("alone", 0, 1, 0, 1, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": None}, "RANK and LOCAL_RANK and .* set, but WORLD_SIZE not"),
        ({"LOCAL_RANK": None, "MASTER_ADDR": ""}, "set, but LOCAL_RANK and MASTER_ADDR not"),
        ({"RANK": "one"}, "RANK='one' in the environment: expected a whole number of at least 0"),
        ({"RANK": "-1"}, "RANK='-1' in the environment"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' in the environment: expected a whole number of at least 1"),
        ({"RANK": "4"}, "RANK=4 contradicts WORLD_SIZE=4: RANK must be less than WORLD_SIZE"),
        ({"LOCAL_RANK": "2", "RANK": "2"}, "LOCAL_RANK=2 contradicts LOCAL_WORLD_SIZE=2"),
        ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE=5 contradicts WORLD_SIZE=4: LOCAL_WORLD_SIZE must be at most"),
        ({"RANK": "0"}, "LOCAL_RANK=1 contradicts RANK=0: LOCAL_RANK must be at most RANK"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
    ],
)
def test_contradictions_name_both_variables(changes: dict[str, str | None], message: str) -> None:
    environment = {name: text for name, text in (TORCHRUN | changes).items() if text is not None}
    with pytest.raises(ConfigError, match=message):
        find_place(environment)


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [
        ("cpu", 8, torch.device("cpu")),
        ("auto", 0, torch.device("cpu")),
        ("auto", 1, torch.device("cpu")),  # NCCL takes one rank per GPU
        ("auto", 2, torch.device("cuda", 1)),
        ("cuda", 2, torch.device("cuda", 1)),
    ],
)
def test_device_of_a_rank(monkeypatch: pytest.MonkeyPatch, device: str, gpus: int, expected: torch.device) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert choose_device(device, PLACE) == expected  # type: ignore[arg-type]


def test_cuda_without_enough_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"run\.device: cuda needs a GPU for each of the 2 ranks .* has 1"):
        choose_device("cuda", PLACE)


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
    description = f"{size} {noun} on 1 node (torchrun), gloo on cpu"
    assert results == [(description, rank, float(size), False) for rank in range(size)]


def test_restarted_workers_do_not_read_the_dead_ones_addresses(tmp_path: Path) -> None:
    # The agent's store outlives the workers; what an earlier incarnation left in it must not be found.
    agent = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for count in ("0", "1"):
        extra = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": count}
        results = run_ranks(2, join, agent.port, extra, process_group=False)
        assert [result[2] for result in results] == [2.0, 2.0]


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


def joined_by_others() -> str:
    place = {**TORCHRUN, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(place)
    if dist.get_rank() == 1:
        return str(bootstrap("cpu", 20.0).owns_group)
    with pytest.raises(ConfigError, match=r"this process is rank 0 of 2 in torch\.distributed, but RANK=1"):
        bootstrap("cpu", 20.0)
    return ""


def test_group_that_exists_is_used_unless_it_contradicts_the_launcher() -> None:
    assert run_ranks(2, joined_by_others) == ["", "False"]
