"""Sums by class: each row in its own class's matrix, whether or not the host knows the labels."""

from __future__ import annotations

import pytest
import torch

from kfac_dist.curvature.class_conditional import Classes, Members
from kfac_dist.errors import ModelError
from tests.curvature.measured import assert_close

LABELS = torch.tensor([2, 0, 0, 3, 2, 9, 2, -1])  # none of class 1; two without a class


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("slots", [4, 5])
def test_ordered_rows_masked_rows_and_the_textbook_agree(ones: bool, slots: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 8, 3, generator=generator)
    members = Classes.of(LABELS, 4, slots).members("layer", 8, inputs=True)
    width = 3 + ones
    ordered, masked = (torch.zeros(slots, 2, width, width) for _ in range(2))
    members.accumulate(ordered, rows, alpha=0.5, ones=ones)
    members.accumulate_masked(masked, rows, alpha=0.5, ones=ones)
    whole = torch.cat([rows, torch.ones(2, 8, 1)], dim=-1) if ones else rows
    for label in range(slots):
        own = label == LABELS if label < 4 else (LABELS < 0) | (LABELS > 3)
        expected = 0.5 * whole[:, own].mT @ whole[:, own]
        assert_close(ordered[label].triu(), expected.triu())
        assert_close(masked[label].triu(), expected.triu())
    assert members.counts(rows.device).tolist() == [2.0, 0.0, 3.0, 1.0, 2.0][:slots]


def test_shares_weigh_inputs_and_leave_gradients_which_have_them() -> None:
    generator = torch.Generator().manual_seed(1)
    rows, shares = torch.randn(1, 6, 3, generator=generator), torch.rand(6, generator=generator)
    classes = Classes(3, index=1, shares=shares)
    for inputs in (True, False):
        out = torch.zeros(3, 1, 4, 4)
        members = classes.members("layer", 6, inputs=inputs)
        members.accumulate(out, rows, alpha=1.0, ones=True)
        whole = torch.cat([rows[0], torch.ones(6, 1)], dim=-1)
        weighed = whole * shares[:, None] if inputs else whole
        assert_close(out[1, 0].triu(), (weighed.mT @ whole).triu())
        assert not bool(out[[0, 2]].any())
        assert_close(members.counts(rows.device), torch.tensor([0.0, float(shares.sum()), 0.0]))


def test_a_label_a_sample_is_every_positions_and_a_label_a_position_its_own() -> None:
    by_sample = Classes.of(torch.tensor([1, 0]), 2, 2).members("layer", 6, inputs=True)
    assert by_sample.labels is not None
    assert by_sample.labels.tolist() == [1, 1, 1, 0, 0, 0]
    by_token = Classes.of(torch.tensor([[1, 0, 1], [0, 0, -100]]), 2, 3).members("layer", 6, inputs=True)
    assert by_token.labels is not None
    assert by_token.labels.tolist() == [1, 0, 1, 0, 0, 2]
    for rows, labels in ((5, torch.tensor([1, 0])), (2, torch.tensor([[1, 0, 1], [0, 0, 1]]))):
        with pytest.raises(ModelError, match=r"layer head has . rows for labels of shape"):
            Classes.of(labels, 2, 2).members("head", rows, inputs=True)


def test_frequencies_of_tokens_by_class() -> None:
    tokens = torch.tensor([4, 1, 1, 0, 4, 3, 4, 2])
    members = Classes.of(LABELS, 4, 4).members("layer", 8, inputs=True)
    found = members.frequencies(tokens, 5)
    assert found.tolist() == [[0, 2, 0, 0, 0], [0] * 5, [0, 0, 0, 0, 3], [1, 0, 0, 0, 0]]
    shared = Members(2, None, 1, torch.arange(8.0)).frequencies(tokens, 5)
    assert shared.tolist() == [[0] * 5, [3.0, 3.0, 7.0, 5.0, 10.0]]
