"""What a failed pass is taken for: bad data, or ranks that are gone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kfac_dist.errors import CollectiveError, DataError, KFACError
from kfac_dist.training.passes import explained


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 4000ms for recv operation", CollectiveError),
        ("Application timeout caused pair closure", CollectiveError),
        ("NCCL error: remote process exited or there was a network error", CollectiveError),
        ("mat1 and mat2 shapes cannot be multiplied (7x6 and 5x3)", DataError),
    ],
)
def test_lost_ranks_are_told_from_data_that_the_model_refuses(message: str, kind: type[KFACError]) -> None:
    batch = torch.zeros(7, 6)
    with pytest.raises(kind, match="step 3: ") as caught, explained("step 3", nn.Linear(5, 3), batch, batch):
        raise RuntimeError(message)
    assert type(caught.value) is kind
    assert message in str(caught.value)
