"""The Gram matrix of a convolution's patches, without ever making the patches.

For stride 1, the sum over *all* offsets t of patches of the zero-extended image depends on two kernel positions k, k'
only through their displacement:

    Σ_t x[t+k] x[t+k']ᵀ = R[k'−k],    R[δ] = Σ_u x[u] x[u+δ]ᵀ

A 3×3 kernel has 81 pairs of positions, but only 13 displacements up to sign. What remains is to take away the offsets
at which the convolution puts no output: a ring around the image, whose few patches are made and subtracted.

            ┌───────────────────────┐  offsets above the first output row: only the kernel's lower rows touch the image
            │  ┌─────────────────┐  │
            │  │  output         │  │  offsets left and right of the output columns, for output rows
            │  └─────────────────┘  │
            └───────────────────────┘
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from kfac_dist.precision import widened

Pair = tuple[int, int]
# Terms of one sum in fp32.
_POSITIONS = 8192


def patch_gram(images: Tensor, kernel: Pair, padding: tuple[Pair, Pair]) -> Tensor:
    """Return `Σ_bt p_bt p_btᵀ` over all patches of a stride-1 convolution with zero padding.

    Args:
        images: `[groups, C, B, H, W]`.
        kernel: Height and width of the kernel.
        padding: Rows before and after, columns before and after; each at most the kernel's size less one.

    Returns:
        `[groups, C·kh·kw, C·kh·kw]` with the channel as the slowest index, as `F.unfold` orders it; fp32, or fp64.
    """
    images = widened(images)
    gram = _toeplitz(_correlations(images, kernel), kernel)
    for rows, columns, excluded in _ring(images, kernel, padding):
        # rows and columns are the kernel positions that touch the image here; the others see zeros.
        gram[:, rows, columns, :, rows, columns] -= _gram_of(excluded)
    groups, channels = images.shape[:2]
    size = channels * kernel[0] * kernel[1]
    # [groups, kh, kw, C, kh', kw', C'] → [groups, C·kh·kw, C'·kh'·kw']
    return gram.permute(0, 3, 1, 2, 6, 4, 5).reshape(groups, size, size)


def correlation_is_cheaper(image: Sequence[int], kernel: Sequence[int]) -> bool:
    """Whether `patch_gram` takes less than half the multiplications of the unfolded patches' Gram matrix.

    Half, because the triangle of the latter is enough, and its patches still have to be written and read.

    Args:
        image: Height and width.
        kernel: Height and width.
    """
    (rows, columns), (height, width) = image, kernel
    displacements = ((2 * height - 1) * (2 * width - 1) + 1) // 2
    correlated = displacements * (rows + height - 1) * (columns + width - 1)
    ring = 2 * (height - 1) * (columns + width - 1) * width**2 + 2 * (width - 1) * rows * height**2
    return 2 * (correlated + ring) < (height * width) ** 2 * rows * columns


def _correlations(images: Tensor, kernel: Pair) -> Tensor:
    """Return `R[δ]` for every displacement: `[groups, 2kh−1, 2kw−1, C, C]`.

    R is the weight gradient of a convolution with the images as its input and as its output's gradient:
    a kernel that libraries have tuned. Displacements downwards are enough, R[−δ] = R[δ]ᵀ.
    """
    height, width = kernel
    groups, channels = images.shape[:2]
    plain = images.permute(2, 0, 1, 3, 4).flatten(1, 2)  # [B, groups·C, H, W]
    below = F.pad(plain, (0, 0, 0, height - 1))
    shape = (groups * channels, channels, height, 2 * width - 1)
    found = images.new_zeros(shape)
    # A few images at a time: one long fp32 sum would round too much.
    some = max(1, _POSITIONS // max(1, plain[0, 0].numel()))
    for images_in, padded in zip(plain.split(some), below.split(some), strict=True):
        found += conv2d_weight(padded, shape, images_in, padding=(0, width - 1), groups=groups)
    down = found.view(groups, channels, channels, height, 2 * width - 1).permute(0, 3, 4, 1, 2)
    up = down[:, 1:].flip(1, 2).mT
    return torch.cat([up, down], dim=1)


def _toeplitz(correlations: Tensor, kernel: Pair) -> Tensor:
    """Spread `R[k'−k]` over all pairs: `[groups, kh, kw, C, kh', kw', C']`."""
    height, width = kernel
    groups, *_, channels = correlations.shape
    pairs = correlations.new_empty(groups, height, width, channels, height, width, channels)
    # By slices: an index of pairs, made on the host, would be copied to the device and waited for.
    for row, column in itertools.product(range(height), range(width)):
        rows = slice(height - 1 - row, 2 * height - 1 - row)
        columns = slice(width - 1 - column, 2 * width - 1 - column)
        pairs[:, row, column] = correlations[:, rows, columns].permute(0, 3, 1, 2, 4)
    return pairs


def _ring(images: Tensor, kernel: Pair, padding: tuple[Pair, Pair]) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the patches at offsets without an output, with the kernel rows and columns that touch the image there.

    Patches are `[groups, rows, columns, C, offsets]`.
    """
    (height, width), (vertical, horizontal) = kernel, padding
    rows_in, columns_in = images.shape[-2:]
    whole_rows, whole_columns = slice(0, height), slice(0, width)
    # Above and below: all horizontal offsets at which anything of the image is seen.
    for first, rows in _outside(rows_in, height, vertical):
        lines = rows.stop - rows.start
        strip = F.pad(images[..., first : first + lines, :], (width - 1, width - 1))
        yield rows, whole_columns, _patches(strip, (lines, width))
    # Left and right: vertical offsets that have an output, so that corners count once.
    for first, columns in _outside(columns_in, width, horizontal):
        lines = columns.stop - columns.start
        strip = F.pad(images[..., first : first + lines], (0, 0, *vertical))
        yield whole_rows, columns, _patches(strip, (height, lines))


def _outside(size: int, kernel: int, padding: Pair) -> Iterator[tuple[int, slice]]:
    """Yield each offset outside of the outputs along one dimension: the first line seen, and by which positions."""
    outputs = size + sum(padding) - kernel + 1
    for offset in (*range(padding[0] - kernel + 1, 0), *range(outputs, size + padding[0])):
        top = offset - padding[0]  # image line under the kernel's first position
        positions = slice(max(0, -top), min(kernel, size - top))
        yield top + positions.start, positions


def _patches(strip: Tensor, kernel: Sequence[int]) -> Tensor:
    """Return all patches `[groups, kh, kw, C, offsets]` of a strip `[groups, C, B, H, W]`."""
    windows = strip.unfold(3, kernel[0], 1).unfold(4, kernel[1], 1)  # [groups, C, B, H', W', kh, kw]
    return windows.permute(0, 5, 6, 1, 2, 3, 4).flatten(4)


def _gram_of(patches: Tensor) -> Tensor:
    """Return `[groups, kh, kw, C, kh', kw', C']` of patches `[groups, kh, kw, C, offsets]`."""
    groups, *features, _ = patches.shape
    rows = patches.flatten(1, 3)
    return torch.bmm(rows, rows.mT).view(groups, *features, *features)
