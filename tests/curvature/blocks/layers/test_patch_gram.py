"""Patches' Gram matrices by correlation equal those of the patches themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kfac_dist.curvature.blocks.layers.patch_gram import correlation_is_cheaper, patch_gram
from tests.curvature.waits import Waits

sizes = st.integers(1, 5)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3), sizes, st.integers(1, 3), sizes, sizes, st.integers(1, 9), st.integers(1, 9), st.data())
def test_every_shape_equals_unfolding(
    groups: int, channels: int, samples: int, height: int, width: int, rows: int, columns: int, data: st.DataObject
) -> None:
    vertical, horizontal = (
        tuple(data.draw(st.integers(0, kernel - 1)) for _ in range(2)) for kernel in (height, width)
    )
    assume(rows + sum(vertical) >= height)
    assume(columns + sum(horizontal) >= width)
    images = torch.randn(groups, channels, samples, rows, columns, dtype=torch.float64).round(decimals=2)
    got = patch_gram(images, (height, width), (vertical, horizontal))
    for group in range(groups):
        padded = F.pad(images[group].transpose(0, 1), (*horizontal, *vertical))
        patches = F.unfold(padded, (height, width)).transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(got[group], patches.T @ patches)


@pytest.mark.parametrize(
    ("image", "kernel", "cheaper"),
    [((32, 32), (3, 3), True), ((8, 8), (3, 3), True), ((2, 2), (3, 3), False), ((32, 32), (1, 1), False)],
)
def test_it_is_chosen_where_it_saves_work(image: tuple[int, int], kernel: tuple[int, int], cheaper: bool) -> None:
    assert correlation_is_cheaper(image, kernel) is cheaper


def test_nothing_is_copied_to_the_device() -> None:
    images = torch.empty(2, 3, 4, 7, 6, device="meta")
    with Waits() as waits:
        patch_gram(images, (3, 2), ((1, 1), (0, 1)))
    assert waits.found == []
