"""Files with slow tests first: run side by side, the last to end is then a short one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from multiprocessing import forkserver

import pytest

from tests.harness import leave_undrawn

# A shell starts background jobs with Ctrl-C ignored, and nohup its own with SIGHUP: tests send both.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# Files that take half a minute or more, though no single test of them is marked.
LONG = (
    "engines/zero/test_engine.py",
    "engines/test_fsdp2.py",
    "integrations/test_huggingface.py",
    "training/test_bad_runs.py",
    "training/test_engines.py",
    "training/recovery/test_preemption.py",
    "training/test_resume.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.path.as_posix().endswith(LONG)}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs end without their picture, but in tests that name `drawn`."""
    drawn = leave_undrawn() if "drawn" not in request.fixturenames else None
    yield
    if drawn is not None:
        drawn()


@pytest.fixture
def drawn() -> None:
    """The picture of the losses is drawn."""


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start processes without coverage: it takes a third of their time, where quicker tests run the same lines."""
    forkserver.ensure_running()  # ranks of later tests come from it, and are measured
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
