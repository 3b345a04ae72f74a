"""Blocks: a file for each kind of layer, the table of layer types, and which layers of a model get one.

base          the interface of blocks
uses, rows    records of a layer's calls, and their rows
linear, convolution, transposed, attention, embedding, tied, norm
heads         a layer's relation to attention's heads
table         layer type → block
coverage      model, configuration → blocks, and reasons for the rest
"""

from kfac_dist.curvature.blocks.base import Block, KroneckerBlock
from kfac_dist.curvature.blocks.find_blocks import Coverage, find_blocks
from kfac_dist.curvature.blocks.layer_calls import LayerCall
from kfac_dist.curvature.blocks.rows import MicroBatch
from kfac_dist.curvature.blocks.table import BLOCK_TYPES

__all__ = ["BLOCK_TYPES", "Block", "Coverage", "KroneckerBlock", "LayerCall", "MicroBatch", "find_blocks"]
