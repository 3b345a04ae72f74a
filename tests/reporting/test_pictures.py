"""Grids of samples as PNG, read back by another library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kfac_dist.reporting.pictures import GAP, MAGNIFIED, is_pictures, write_grid


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_every_sample_in_its_place(tmp_path: Path, channels: int) -> None:
    imread = pytest.importorskip("matplotlib.image").imread
    shades = np.linspace(-1, 1, 5 * channels).reshape(5, channels, 1, 1)
    samples = np.broadcast_to(shades, (5, channels, 2, 3)).copy()
    samples[4] += 9  # what lies beyond is cut
    write_grid(samples, tmp_path / "samples" / "grid.png")
    pixels = imread(tmp_path / "samples" / "grid.png")
    pixels = pixels if pixels.ndim == 3 else pixels[:, :, None]
    tall, wide = 2 * MAGNIFIED + GAP, 3 * MAGNIFIED + GAP
    assert pixels.shape == (2 * tall + GAP, 3 * wide + GAP, channels)
    for index in range(5):
        row, column = divmod(index, 3)
        tile = pixels[row * tall + GAP : (row + 1) * tall, column * wide + GAP : (column + 1) * wide]
        wanted = (np.clip(samples[index, :, 0, 0], -1, 1) + 1) / 2
        np.testing.assert_allclose(tile, np.broadcast_to(wanted, tile.shape), atol=1 / 255)
    np.testing.assert_allclose(pixels[:GAP], 128 / 255, atol=1e-6)


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    assert is_pictures((4, 8, 8))
    assert not is_pictures((4, 2, 8, 8))
    with pytest.raises(ValueError, match=r"\(4, 7\) are no pictures"):
        write_grid(np.zeros((4, 7)), tmp_path / "grid.png")
