"""A failure on one rank is a failure on all, with that rank's reason."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from kfac_dist.distributed.communicators.base import SoloCommunicator
from kfac_dist.distributed.communicators.build import build_communicator
from kfac_dist.errors import CheckpointError, CollectiveError, DataError, KFACError
from kfac_dist.training.agreement import agreed
from tests.harness import run_ranks


def test_errors_of_the_user_keep_their_type_and_others_get_one() -> None:
    solo = SoloCommunicator()
    with agreed(solo):
        pass
    with pytest.raises(DataError, match=r"^no data$"), agreed(solo, CheckpointError, "can't save"):
        raise DataError("no data")
    with (
        pytest.raises(CheckpointError, match=r"^can't save: full$") as caught,
        agreed(solo, CheckpointError, "can't save"),
    ):
        raise OSError("full")
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(KFACError, match=r"^ZeroDivisionError: division by zero$"), agreed(solo):
        _ = 1 / 0
    with pytest.raises(KFACError, match=r"^KeyError: KeyError$"), agreed(solo):
        raise KeyError


def test_ranks_that_have_lost_each_other_do_not_vote() -> None:
    with pytest.raises(CollectiveError, match="timed out"), agreed(SoloCommunicator(), DataError, "can't read"):
        raise CollectiveError("timed out")


def _one_fails() -> tuple[str, str]:
    communicator = build_communicator(20.0)
    try:
        with agreed(communicator):
            if dist.get_rank() == 1:
                raise DataError("no such file")
    except KFACError as error:
        return type(error).__name__, str(error)
    finally:
        communicator.close()
    return "", ""


def test_every_rank_hears_of_it() -> None:
    assert run_ranks(3, _one_fails) == [
        ("DataError", "rank 1: no such file"),
        ("DataError", "no such file"),
        ("DataError", "rank 1: no such file"),
    ]
