"""A grid of a generator's samples as one PNG.

Written by hand, because a PNG of plain pixels is a header and one deflated block, and a run needs no other package for
it (https://www.w3.org/TR/png).
"""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Screen pixels of one of a sample's, and between samples.
MAGNIFIED = 4
GAP = 4
_GAP_SHADE = 128


def write_grid(samples: NDArray[np.floating], path: Path) -> None:
    """Write samples as a picture, row by row, as square as they allow.

    Args:
        samples: `[n, channels, height, width]` of 1 (grey) or 3 (red, green, blue) channels, or `[n, height, width]`;
            values from −1 (black) to 1 (white), beyond which they are cut.
        path: The file to write; its directory is made.

    Raises:
        ValueError: The samples are no pictures.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(grid(samples)))


def is_pictures(shape: tuple[int, ...]) -> bool:
    """Whether samples of this shape, their number included, can be shown."""
    return len(shape) == 3 or (len(shape) == 4 and shape[1] in (1, 3))


def grid(samples: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return the picture's pixels `[height, width, channels]`; see `write_grid`."""
    if not is_pictures(samples.shape) or not len(samples):
        raise ValueError(f"samples of shape {samples.shape} are no pictures: expected [n, 1 or 3, height, width]")
    images = samples[:, None] if samples.ndim == 3 else samples
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    shades = np.clip((np.nan_to_num(images) + 1) * 127.5, 0, 255).round().astype(np.uint8)
    shades = shades.repeat(MAGNIFIED, axis=2).repeat(MAGNIFIED, axis=3).transpose(0, 2, 3, 1)
    tall, wide = height * MAGNIFIED + GAP, width * MAGNIFIED + GAP
    pixels = np.full((rows * tall + GAP, columns * wide + GAP, channels), _GAP_SHADE, dtype=np.uint8)
    for index, image in enumerate(shades):
        top, left = index // columns * tall + GAP, index % columns * wide + GAP
        pixels[top : top + tall - GAP, left : left + wide - GAP] = image
    return pixels


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Return `[height, width, 1 or 3]` as a PNG file."""
    height, width, channels = pixels.shape
    kind = 0 if channels == 1 else 2  # grey, or true colour
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)  # 0: no filter
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(lines)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
