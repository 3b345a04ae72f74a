"""One piece of work beside training: it runs in a thread, and its failure waits until it is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kfac_dist.errors import KFACError


class Background:
    """Runs one function at a time.

    The thread doesn't keep the process alive: a rank that fails must not wait for a file that others don't finish.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: KFACError | None = None

    @property
    def failed(self) -> bool:
        """Whether the work has ended by an error that has not been reported yet."""
        return self._failure is not None

    def start(self, work: Callable[[], object], what: str) -> None:
        """Start the work, once the last one is over.

        Args:
            work: The function to run.
            what: Name of the thread.

        Raises:
            KFACError: The last one has failed.
        """
        self.finish()
        self._thread = threading.Thread(target=self._run, args=(work,), name=what, daemon=True)
        self._thread.start()

    def finish(self, seconds: float | None = None) -> None:
        """Wait for the work, at most so many seconds.

        Raises:
            KFACError: It has failed.
        """
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return
        self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except KFACError as error:
            self._failure = error
        except Exception as error:  # a thread has no caller to raise to: training raises it at its next boundary
            self._failure = KFACError(f"{threading.current_thread().name}: {type(error).__name__}: {error}")
            self._failure.__cause__ = error
