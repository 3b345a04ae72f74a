"""The rows that a measurement copies before it multiplies them: `sample_fraction` saves them.

Inputs and output gradients are there anyway, autograd holds them, and a choice of rows is a view of them. What is
copied is what has to be in fp32 to be multiplied, one layer's side at a time:

    rows             16-bit model          fp32 model
    A                fp32                  nothing
    G                fp32                  nothing
    G, ĝ = d·∂L/∂s   fp32, and times d     times d          d a number of valid tokens that the device alone knows
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kfac_dist.config.schema import Fisher, KFACConfig, Sharing
from kfac_dist.curvature.blocks import Block, KroneckerBlock
from kfac_dist.curvature.blocks.layers.convolution import ConvolutionBlock
from kfac_dist.curvature.blocks.layers.embedding import EmbeddingBlock

_FLOAT = 4


@dataclass(frozen=True)
class MicroRows:
    """The planner's view of one micro-batch on one rank.

    Attributes:
        rows: Rows of each block, as far as they are known.
        half: Whether the model computes in 16 bits.
        counted: Whether the device alone knows over how many terms the loss is a mean.
    """

    rows: Mapping[str, float] = field(default_factory=dict)
    half: bool = False
    counted: bool = False

    @property
    def copied(self) -> bool:
        """Whether anything is copied at all."""
        return self.half or self.counted


def copied_bytes(blocks: Sequence[Block], config: KFACConfig, micro: MicroRows) -> int | None:
    """Return the bytes of the largest copy that measuring a micro-batch makes; None if no block's rows are known.

    A sample's summed rows (sharing `reduce`) and a convolution's patches are made before rows are chosen: sampling
    spares nothing of them, and they don't count.

    Args:
        blocks: The model's blocks.
        config: What is measured, and what share of it.
        micro: The micro-batch.
    """
    if not micro.copied:
        return 0
    if not micro.rows:
        return None
    share = config.curvature.sample_fraction
    # K-FAC's own passes send back gradients of a term, which nothing has divided.
    counted = micro.counted and config.curvature.fisher is Fisher.EMPIRICAL
    sizes = (
        micro.rows.get(block.name, 0.0) * values for block in blocks for values in _values(block, micro.half, counted)
    )
    return round(_FLOAT * share * max(sizes, default=0.0))


def _values(block: Block, half: bool, counted: bool) -> Iterator[int]:
    """Yield the fp32 values that each side of a block copies of a row."""
    if not isinstance(block, KroneckerBlock | EmbeddingBlock) or block.sharing is not Sharing.EXPAND:
        return
    groups, d_out, d_in = block.matrix_shape
    if isinstance(block, KroneckerBlock) and not isinstance(block, ConvolutionBlock):
        yield half * groups * (d_in - block.has_bias)
    yield (half + counted) * groups * d_out
