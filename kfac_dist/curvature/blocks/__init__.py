"""Blocks: a file for each kind of layer, the table of layer types, and which layers of a model get one.

base          what a block is
uses, rows    what is kept of a layer's calls, and how it becomes rows
linear, convolution, transposed, attention, embedding, tied, norm
heads         what a layer has to do with attention's heads
table         layer type → block
coverage      model, configuration → blocks, and reasons for the rest
"""

from kfac_dist.curvature.blocks.base import Block, KroneckerBlock
from kfac_dist.curvature.blocks.find_blocks import Coverage, find_blocks
from kfac_dist.curvature.blocks.layer_calls import LayerCall
from kfac_dist.curvature.blocks.rows import MicroBatch
from kfac_dist.curvature.blocks.table import BLOCK_TYPES

__all__ = ["BLOCK_TYPES", "Block", "Coverage", "KroneckerBlock", "LayerCall", "MicroBatch", "find_blocks"]
