"""No rank acts alone: ranks compare their plans before they start, and vote before they leave the common path."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import zip_longest

import torch

from kfac_dist.distributed.communicator import Communicator
from kfac_dist.errors import PlanMismatchError


def plan_digest(rows: Sequence[tuple[str, str]]) -> str:
    """Hexadecimal SHA-256 of a plan's rows, their order included."""
    digest = hashlib.sha256()
    for name, description in rows:
        for text in (name, description):
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def agree_on_plan(comm: Communicator, rows: Sequence[tuple[str, str]]) -> str:
    """Makes sure that all ranks are about to do the same work; collective.

    Only hashes travel while the ranks agree.

    Args:
        comm: The ranks.
        rows: The plan: (block name, everything that collectives depend on), in the order of the work.

    Returns:
        The hash of the plan.

    Raises:
        PlanMismatchError: On every rank, with the same message: the first block that differs and what the ranks have.
    """
    own = plan_digest(rows)
    digests = comm.gather_objects(own, label="plan")
    if len(set(digests)) == 1:
        return own
    plans: list[list[tuple[str, str]]] = comm.gather_objects(list(rows), label="plan")
    for index, versions in enumerate(zip_longest(*plans)):
        if len(set(versions)) > 1:
            raise PlanMismatchError(_describe(index, versions))
    raise AssertionError("plans with different hashes differ somewhere")


def any_rank(comm: Communicator, flag: bool) -> bool:
    """Whether the flag is set on any rank, the same answer on all; collective, and on a GPU the host waits for it."""
    if comm.size == 1:
        return flag
    votes = torch.tensor([int(flag)], dtype=torch.int32, device=comm.device)
    comm.all_reduce(votes, label="agreement").wait()
    return bool(votes.item())


def _describe(index: int, versions: Sequence[tuple[str, str] | None]) -> str:
    names = sorted({row[0] for row in versions if row is not None})
    by_version: dict[tuple[str, str] | None, list[int]] = {}
    for rank, row in enumerate(versions):
        by_version.setdefault(row, []).append(rank)
    lines = [
        f"  rank{'s' if len(ranks) > 1 else ''} {_ranges(ranks)}: "
        + ("no such block, the plan ends before it" if row is None else f"{row[0]}: {row[1]}")
        for row, ranks in by_version.items()
    ]
    return "\n".join(
        [
            f"the ranks plan different work, first at block {index} ({' / '.join(names)}):",
            *lines,
            "every rank must build the same model and read the same configuration",
        ]
    )


def _ranges(ranks: Sequence[int]) -> str:
    """Ascending ranks as "0-3, 7": thousands of them fit one line."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
