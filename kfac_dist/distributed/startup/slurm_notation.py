"""SLURM's compact notations, read: `node[01-03,07],login` and `2(x3),1`."""

from __future__ import annotations

import re

from kfac_dist.errors import ConfigError

_BRACKETS = re.compile(r"\[([^\]]*)\]")
_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def first_host(nodes: str) -> str:
    """The first host of a node list: `node01` of `node[01-03,07],login`.

    Raises:
        ConfigError: It is no node list.
    """
    # The first comma outside of brackets ends the first entry; the first number of each bracket belongs to its host.
    entry = re.match(r"((?:[^,\[\]]|\[[^\]]*\])+)(?:,|$)", nodes)
    host = _BRACKETS.sub(lambda found: re.split("[-,]", found[1])[0], entry[1]) if entry else ""
    if not host or set(host) & set("[], "):
        raise ConfigError(f"{nodes!r} is no node list of SLURM's, such as node[01-03,07]: set MASTER_ADDR instead")
    return host


def tasks_per_node(counts: str) -> list[int]:
    """The tasks of every node: `[2, 2, 2, 1]` of `2(x3),1`.

    Raises:
        ConfigError: It is no such list.
    """
    numbers: list[int] = []
    for part in counts.split(","):
        found = _COUNT.fullmatch(part)
        if found is None:
            raise ConfigError(f"{counts!r} is no list of tasks per node of SLURM's, such as 2(x3),1")
        numbers += [int(found[1])] * int(found[2] or 1)
    return numbers
