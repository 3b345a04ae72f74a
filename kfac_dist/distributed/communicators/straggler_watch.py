"""Names of the ranks that a collective waits for: asked once it has failed, by the store in which the ranks met.

    rank 0   step ── step ── all_reduce …………… timeout ── question ──────────────────▶ "rank 1 doesn't answer"
    rank 1   step ── stopped                                  │   ▲
    rank 2   step ── step ── all_reduce ………………………………………………… ▼ ───┘ "step 7: backward", from a thread

Nothing is told before it is asked: what a rank said a while ago would pass for an answer. While steps follow each other
nothing is sent; a rank that stands still looks for a question once a tick.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from torch.distributed import PrefixStore, Store

from kfac_dist.distributed.communicators.lost import is_of_lost_ranks, lost_ranks
from kfac_dist.distributed.startup.rank_names import name_ranks
from kfac_dist.errors import CollectiveError, KFACError

TICK_SECONDS = 1.0
_QUESTION = "asked"
# After a failure the others are given so many ticks to tell; the store itself, twice as many.
_PATIENCE = 3


class Watch:
    """Knows this rank's activity, and answers other ranks' questions; a context, in which its thread runs.

    Args:
        store: The store of all ranks; None if a rank is alone, or didn't use a store at start-up.
        rank: This rank.
        size: Number of ranks.
        tick_seconds: Seconds of waiting after which a rank looks for a question.
        on_lost: Told of a collective that has failed, once it is explained and before anything is taken down.
    """

    def __init__(
        self,
        store: Store | None,
        rank: int,
        size: int,
        tick_seconds: float = TICK_SECONDS,
        on_lost: Callable[[CollectiveError], object] | None = None,
    ) -> None:
        self._store = None if store is None or size == 1 else PrefixStore("watch", store)
        self._rank = rank
        self._size = size
        self._tick = tick_seconds
        self._on_lost = on_lost
        self._where = "starting"
        self._changed = True
        self._explained: CollectiveError | None = None
        self._over = threading.Event()

    def set_activity(self, activity: str) -> None:
        """Note what this rank does now; costs next to nothing."""
        self._where = activity
        self._changed = True

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Say of a collective that fails which ranks don't answer, and where the others wait.

        Any collective counts: a communicator's, or one that torch or DeepSpeed starts by itself. These contexts may
        be nested: the innermost asks, before anything is taken down.

        Raises:
            CollectiveError: A collective has failed.
        """
        try:
            yield
        except CollectiveError as error:
            if error is self._explained:
                raise
            raise self._explain(error) from error
        except KFACError:
            raise
        except Exception as error:
            if self._size == 1 or not is_of_lost_ranks(error):
                raise
            raise self._explain(lost_ranks(f"rank {self._rank} of {self._size}, {self._where}", error)) from error

    def _explain(self, error: CollectiveError) -> CollectiveError:
        self._explained = CollectiveError(f"{error}{self._explanation()}")
        if self._on_lost is not None:
            self._on_lost(self._explained)
        return self._explained

    def __enter__(self) -> Self:
        if self._store is not None:
            threading.Thread(target=self._watch, args=(self._store,), name="watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def _watch(self, store: Store) -> None:
        answered = ""
        while not self._over.wait(self._tick):
            changed, self._changed = self._changed, False
            where = self._where
            if changed or answered == where:
                continue
            try:
                if store.check([_QUESTION]):
                    store.set(str(self._rank), where)
                    answered = where
            except RuntimeError:  # its server is gone: no question can come
                return

    def _explanation(self) -> str:
        if self._store is None:
            return ""
        answers: list[str | None] = []
        # In a thread: a store whose server stands still keeps its callers for as long.
        asking = threading.Thread(target=self._ask, args=(self._store, answers), name="watch", daemon=True)
        asking.start()
        asking.join(2 * _PATIENCE * self._tick)
        if asking.is_alive() or not answers:
            return "; nor does the store answer in which the ranks met: rank 0, or torchrun's first agent, serves it"
        silent = [rank for rank, where in enumerate(answers) if where is None]
        places: dict[str, list[int]] = {}
        for rank, where in enumerate(answers):
            if where is not None:
                places.setdefault(where, []).append(rank)
        said = [f"{name_ranks(ranks)} in {where}" for where, ranks in places.items()]
        return (f"; no answer from {name_ranks(silent)}" if silent else "") + f"; waiting: {', '.join(said)}"

    def _ask(self, store: Store, answers: list[str | None]) -> None:
        """Ask all ranks, report this rank's position, and collect the others' reports after some time."""
        try:
            store.set(_QUESTION, str(self._rank))
            store.set(str(self._rank), self._where)
            keys = [str(rank) for rank in range(self._size)]
            for _ in range(_PATIENCE):
                if store.check(keys):
                    break
                self._over.wait(self._tick)
            answers.extend([store.get(key).decode() if store.check([key]) else None for key in keys])
        except RuntimeError:  # no server any more: no answer
            answers.clear()
