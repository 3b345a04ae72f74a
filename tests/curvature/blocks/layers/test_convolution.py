"""A convolution's A by correlation, with everything around it: bias, groups, count, pieces."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.config.schema import Sharing
from kfac_dist.curvature.blocks.layer_calls import LayerCall
from kfac_dist.curvature.blocks.layers import convolution
from kfac_dist.curvature.blocks.layers import patch_gram as correlation
from kfac_dist.curvature.blocks.layers.convolution import ConvolutionBlock
from kfac_dist.curvature.blocks.rows import MicroBatch
from kfac_dist.curvature.factors import Side, units_of
from kfac_dist.curvature.gram import complete
from kfac_dist.curvature.statistics import RunningAverages

LAYERS = {
    "bias": nn.Conv2d(3, 5, 3, padding=1),
    "no bias": nn.Conv2d(3, 5, 3, padding=1, bias=False),
    "groups": nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "no padding": nn.Conv2d(2, 3, (3, 2)),
    "same": nn.Conv2d(2, 3, (4, 5), padding="same"),
    "half precision": nn.Conv2d(3, 5, 5, padding=2).to(torch.bfloat16),
}


def unfolded(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """A from `F.unfold`, `[groups, n, n]`."""
    sides = convolution.padding_of(layer)
    padded = F.pad(images.float(), [width for pair in reversed(sides) for width in pair])
    patches = F.unfold(padded, layer.kernel_size).transpose(1, 2).flatten(0, 1)
    grouped = patches.unflatten(1, (layer.groups, -1)).transpose(0, 1)
    rows = F.pad(grouped, (0, 1), value=1.0) if layer.bias is not None else grouped
    return rows.mT @ rows / rows.shape[1]


def call(layer: nn.Module, images: torch.Tensor) -> LayerCall:
    seen = LayerCall(layer, layer(images).shape)
    seen.keep(images)
    return seen


@pytest.mark.parametrize("max_dim", [None, 11])
@pytest.mark.parametrize("name", LAYERS)
def test_it_equals_unfolding(name: str, max_dim: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LAYERS[name]
    images = torch.randn(4, layer.in_channels, 12, 11).to(layer.weight.dtype)
    used = []
    monkeypatch.setattr(convolution, "patch_gram", lambda *args: used.append(args) or correlation.patch_gram(*args))
    block = ConvolutionBlock("conv", layer, Sharing.EXPAND)
    units = [unit for unit in units_of("conv", block.factors, max_dim) if unit.side is Side.A]
    averages = RunningAverages(units, units, decay=0.0, device=torch.device("cpu"))
    block.measure(
        [call(layer, images[:2]), call(layer, images[2:])],
        MicroBatch(terms=2.0, batch_size=2),
        averages,
        frozenset({Side.A}),
    )
    span = averages.layout.span(0, len(units))
    averages.close(span)
    averages.advance(span, torch.tensor(True))
    assert len(used) == 2
    wanted = unfolded(layer, images)
    for index, unit in enumerate(units):
        factor = complete(averages.sums(unit)) / averages.scalars[0, index]
        part = slice(unit.start, unit.stop)
        torch.testing.assert_close(factor, wanted[:, part, part], rtol=1e-4, atol=1e-4)
