"""No rank acts alone: ranks compare their plans before they start, and vote before they leave the common path."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest

import torch

from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.distributed.startup.rank_names import name_ranks
from kfac_dist.errors import CollectiveError, KFACError, PlanMismatchError


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
        PlanMismatchError: On every rank, with the same message: the first block that differs and the ranks' values.
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


@contextmanager
def caught(describe: Callable[[Exception], KFACError]) -> Iterator[list[KFACError]]:
    """Keep a block's failure for `fail_together`, in a list that is empty if there is none.

    Args:
        describe: Makes of any other exception one that the user can read.

    Raises:
        CollectiveError: The ranks have lost each other: there is nothing left to agree on.
    """
    found: list[KFACError] = []
    try:
        yield found
    except CollectiveError:
        raise
    except KFACError as error:
        found.append(error)
    except Exception as error:  # the other ranks must know of any exception before this one leaves
        found.append(describe(error))
        found[0].__cause__ = error


def fail_together(comm: Communicator, found: Sequence[KFACError]) -> None:
    """Raise on every rank if a rank has failed, so that no rank waits for one that has left; collective.

    Args:
        comm: The ranks.
        found: The failure on this rank, if any; see `caught`.

    Raises:
        KFACError: On a rank that failed its own, on the others one of the same kind that names the rank.
    """
    failures = comm.gather_objects([(type(failure), str(failure)) for failure in found], label="agreement")
    if found:
        raise found[0]
    for rank, others in enumerate(failures):
        for kind, message in others:
            raise kind(f"rank {rank}: {message}")


@contextmanager
def agreed(communicator: Communicator, error_type: type[KFACError] = KFACError, what: str = "") -> Iterator[None]:
    """Run a block on every rank and let none continue unless it succeeded on all.

    Args:
        communicator: The ranks; every one of them enters the block.
        error_type: Type of the error in place of the block's exceptions other than `KFACError`.
        what: Description of the failure, such as "can't write runs/a".

    Raises:
        KFACError: The block failed on a rank: on that rank its own error, on the others one that names the rank.
    """

    def failed(error: Exception) -> KFACError:
        reason = str(error).strip() or type(error).__name__
        return error_type(f"{what}: {reason}" if what else f"{type(error).__name__}: {reason}")

    with caught(failed) as found:
        yield
    fail_together(communicator, found)


def _describe(index: int, versions: Sequence[tuple[str, str] | None]) -> str:
    names = sorted({row[0] for row in versions if row is not None})
    by_version: dict[tuple[str, str] | None, list[int]] = {}
    for rank, row in enumerate(versions):
        by_version.setdefault(row, []).append(rank)
    lines = [
        f"  {name_ranks(ranks)}: "
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
