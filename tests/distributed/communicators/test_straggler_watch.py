from __future__ import annotations

import re
import time

import pytest
from torch.distributed import DistBackendError, HashStore, PrefixStore, Store, TCPStore

from kfac_dist.distributed.communicators.straggler_watch import Watch
from kfac_dist.errors import CollectiveError, DataError

TICK = 0.05


def _said(watch: Watch) -> str:
    with pytest.raises(CollectiveError) as caught, watch.explaining():
        raise CollectiveError("all_reduce failed")
    return str(caught.value)


def test_a_failure_names_who_waits_where_and_who_does_not_answer() -> None:
    store = HashStore()
    asking, waiting, stopped = (Watch(store, rank, 4, TICK) for rank in (0, 1, 2))
    asking.set_activity("step 7, backward")
    with waiting:
        stopped.set_activity("step 7, backward")
        waiting.set_activity("step 7, loading the batch")
        time.sleep(4 * TICK)
        waiting.set_activity("step 7, backward")
        said = _said(asking)
    assert said == (
        "all_reduce failed; no answer from ranks 2-3; waiting: rank 0 in step 7, backward, "
        "rank 1 in step 7, loading the batch"
    ) or said.endswith("no answer from ranks 2-3; waiting: ranks 0-1 in step 7, backward")


def test_ranks_that_move_on_tell_nothing() -> None:
    store = HashStore()
    with Watch(store, 0, 2, TICK) as watch:
        for step in range(20):
            watch.set_activity(f"step {step}")
            time.sleep(TICK / 4)
        assert not PrefixStore("watch", store).check(["0"])
        time.sleep(4 * TICK)
        assert not PrefixStore("watch", store).check(["0"])  # nor does one that stands still, before it is asked


def test_what_a_rank_would_have_said_before_is_no_answer() -> None:
    store = HashStore()
    asking, stopped = (Watch(store, rank, 2, TICK) for rank in (0, 1))
    asking.set_activity("step 36, K-FAC and the optimizer")
    with stopped:
        time.sleep(4 * TICK)  # it stands still in "starting", as a slow start does
        stopped.set_activity("step 36, K-FAC and the optimizer")
        time.sleep(4 * TICK)
    assert "no answer from rank 1; waiting: rank 0 in step 36" in _said(asking)


def _fail_on_the_way_out(error: Exception) -> None:
    try:
        raise error
    finally:
        raise AssertionError("what an engine finds then")


GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1\nand a page more"


@pytest.mark.parametrize(
    "error", [RuntimeError(GLOO), RuntimeError("Application timeout caused pair closure"), DistBackendError("aborted")]
)
def test_a_collective_of_torch_s_or_deepspeed_s_own_is_explained_too(error: Exception) -> None:
    watch = Watch(HashStore(), 0, 2, TICK)
    watch.set_activity("step 7, K-FAC and the optimizer")
    with pytest.raises(CollectiveError) as caught, watch.explaining():
        _fail_on_the_way_out(error)
    first, _, _ = str(error).partition("\n")
    said = "rank 0 of 2, step 7, K-FAC and the optimizer: the other ranks are gone or stand still "
    assert str(caught.value).startswith(said)
    assert "; no answer from rank 1; waiting: rank 0 in step 7" in str(caught.value)
    with pytest.raises(CollectiveError, match=re.escape(f"({first})")), watch.explaining():
        raise error


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2"), BrokenPipeError("Broken pipe"), DataError("a gloo")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, Watch(HashStore(), 0, 2, TICK).explaining():
        raise error
    assert caught.value is error
    with pytest.raises(RuntimeError), Watch(None, 0, 1).explaining():
        raise RuntimeError(GLOO)


def test_the_innermost_context_tells_of_the_loss_once() -> None:
    told: list[CollectiveError] = []
    watch = Watch(None, 0, 1, on_lost=told.append)
    with pytest.raises(CollectiveError) as caught, watch.explaining(), watch.explaining():
        raise CollectiveError("all_reduce failed")
    assert told == [caught.value]


def test_alone_nothing_is_added() -> None:
    assert _said(Watch(None, 0, 1)) == "all_reduce failed"


class _Stopped(Store):
    """Answers nobody, as a store does whose process was stopped."""

    def set(self, key: str, value: str) -> None:  # type: ignore[override]
        time.sleep(60)


def test_a_store_that_stands_still_or_is_gone_is_named() -> None:
    began = time.monotonic()
    watch = Watch(None, 0, 2, TICK)
    watch._store = _Stopped()  # type: ignore[assignment]
    assert "nor does the store answer" in _said(watch)
    assert time.monotonic() - began < 5
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("localhost", server.port, is_master=False, wait_for_workers=False)
    del server
    assert "nor does the store answer" in _said(Watch(client, 1, 2, TICK))
