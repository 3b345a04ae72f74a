"""Check that the ranks' devices fit together: through the store where they meet, before any waits in a backend.

    every rank   its findings: backend, host, GPUs, problem ──▶ store
    rank 0       reads all ──▶ store: "", or the problem ──▶ every rank continues, or raises it

A node that has lost a GPU would choose gloo where the others choose NCCL, and all would wait for their timeout.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch.distributed import PrefixStore, Store

from kfac_dist.distributed.startup.rank_names import name_ranks
from kfac_dist.errors import ConfigError

_PREFIX = "kfac_dist/devices"
# The rank that serves the store leaves last, so that the others can read why.
_PARTING_SECONDS = 5.0
_PAUSE_SECONDS = 0.02
# Of each side so many are named.
_HOSTS = 3


@dataclass(frozen=True)
class Found:
    """A rank's devices.

    Attributes:
        backend: Backend that it would join by.
        host: Name of its host.
        gpus: GPUs that it sees.
        problem: Why it can't compute as configured; empty if it can.
    """

    backend: str
    host: str
    gpus: int
    problem: str = ""


def compare(store: Store, rank: int, size: int, own: Found) -> None:
    """Check that all ranks can compute, over the same backend; collective.

    Raises:
        ConfigError: On every rank: one of them has a problem, or their backends differ.
        RuntimeError: A rank has not come within the store's timeout.
    """
    meeting = PrefixStore(_PREFIX, store)
    meeting.set(str(rank), json.dumps(asdict(own)))
    if rank:
        verdict = meeting.get("verdict").decode()
        meeting.set(f"read/{rank}", "")
    else:
        found = meeting.multi_get([str(other) for other in range(size)])
        verdict = judge([Found(**json.loads(text)) for text in found])
        meeting.set("verdict", verdict)
        if verdict:
            _wait_for_readers(meeting, size)
    if verdict:
        raise ConfigError(verdict)


def judge(found: Sequence[Found]) -> str:
    """Return the problem with the ranks' findings, in their order; empty if they fit together."""
    for rank, one in enumerate(found):
        if one.problem:
            return f"rank {rank} on {one.host}: {one.problem}"
    if len({one.backend for one in found}) == 1:
        return ""
    sides: dict[str, list[int]] = {}
    for rank, one in enumerate(found):
        sides.setdefault(one.backend, []).append(rank)
    listed = ", ".join(f"{name} on {name_ranks(ranks)} ({_hosts(found, ranks)})" for name, ranks in sides.items())
    return (
        f"run.device: ranks would meet by different backends: {listed}; leave out the nodes whose GPUs are missing, or "
        "set run.device to cpu"
    )


def _wait_for_readers(meeting: Store, size: int) -> None:
    keys = [f"read/{rank}" for rank in range(1, size)]
    deadline = time.monotonic() + _PARTING_SECONDS
    while keys and not meeting.check(keys) and time.monotonic() < deadline:
        time.sleep(_PAUSE_SECONDS)


def _hosts(found: Sequence[Found], ranks: Sequence[int]) -> str:
    hosts = list(dict.fromkeys(f"{found[rank].gpus} GPUs on {found[rank].host}" for rank in ranks))
    return ", ".join(hosts[:_HOSTS]) + (f" and {len(hosts) - _HOSTS} more" if len(hosts) > _HOSTS else "")
