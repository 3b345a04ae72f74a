from __future__ import annotations

import pytest

from kfac_dist.distributed.startup.slurm_notation import first_host, tasks_per_node
from kfac_dist.errors import ConfigError


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("gpu-a.cluster.org,gpu-b", "gpu-a.cluster.org"),
        ("node[01-03,07],login", "node01"),
        ("node[7,9-12]", "node7"),
        ("login,node[1-2]", "login"),
        ("rack[2-3]-node[004,008]", "rack2-node004"),
    ],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", ",", "node[1-2", "[]", "a b"])
def test_what_is_no_node_list_is_refused(nodes: str) -> None:
    with pytest.raises(ConfigError, match="is no node list"):
        first_host(nodes)


@pytest.mark.parametrize(
    ("counts", "numbers"), [("1", [1]), ("2,1", [2, 1]), ("2(x3),1", [2, 2, 2, 1]), ("8(x2)", [8, 8])]
)
def test_tasks_per_node(counts: str, numbers: list[int]) -> None:
    assert tasks_per_node(counts) == numbers


@pytest.mark.parametrize("counts", ["", "two", "2(x)", "2,,1"])
def test_what_is_no_list_of_tasks_is_refused(counts: str) -> None:
    with pytest.raises(ConfigError, match="is no list of tasks per node"):
        tasks_per_node(counts)
