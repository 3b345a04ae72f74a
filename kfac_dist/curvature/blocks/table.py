"""The layer types that have a block, in one table; the next type is one class in one file and one row here."""

from __future__ import annotations

from torch import nn

from kfac_dist.curvature.blocks.base import Block
from kfac_dist.curvature.blocks.layers.attention import AttentionBlock
from kfac_dist.curvature.blocks.layers.convolution import ConvolutionBlock
from kfac_dist.curvature.blocks.layers.embedding import EmbeddingBlock
from kfac_dist.curvature.blocks.layers.linear import InputFirstLinearBlock, LinearBlock
from kfac_dist.curvature.blocks.layers.norm import BatchNormBlock, GroupNormBlock, LayerNormBlock
from kfac_dist.curvature.blocks.layers.rms_norm import RMSNormBlock, is_rms_norm
from kfac_dist.curvature.blocks.layers.scaled import ScaledBlock, is_scaled
from kfac_dist.curvature.blocks.layers.transposed import TransposedConvolutionBlock

# A class of a package that need not be installed is named by its module and its name.
BLOCK_TYPES: dict[type[nn.Module] | str, type[Block]] = {
    nn.Linear: LinearBlock,
    "transformers.pytorch_utils.Conv1D": InputFirstLinearBlock,
    nn.Conv1d: ConvolutionBlock,
    nn.Conv2d: ConvolutionBlock,
    nn.Conv3d: ConvolutionBlock,
    nn.ConvTranspose1d: TransposedConvolutionBlock,
    nn.ConvTranspose2d: TransposedConvolutionBlock,
    nn.ConvTranspose3d: TransposedConvolutionBlock,
    nn.MultiheadAttention: AttentionBlock,
    nn.Embedding: EmbeddingBlock,
    nn.LayerNorm: LayerNormBlock,
    nn.RMSNorm: LayerNormBlock,
    nn.GroupNorm: GroupNormBlock,
    nn.BatchNorm1d: BatchNormBlock,
    nn.BatchNorm2d: BatchNormBlock,
    nn.BatchNorm3d: BatchNormBlock,
    nn.SyncBatchNorm: BatchNormBlock,
}


def block_class(module: nn.Module) -> type[Block] | None:
    """Return the block of a module's type, or of the nearest type that it derives from; None if there is none.

    RMS norms of no known type, and what scales its outputs otherwise, are recognised by what they compute.
    """
    base = covered_type(module)
    if base is not None:
        return BLOCK_TYPES.get(base) or BLOCK_TYPES[_full_name(base)]
    if is_rms_norm(module):
        return RMSNormBlock
    return ScaledBlock if is_scaled(module) else None


def covered_type(module: nn.Module) -> type[nn.Module] | None:
    """Return the type in the table that a module is of, or the nearest that it derives from; None if there is none."""
    kinds = type(module).__mro__
    return next((base for base in kinds if base in BLOCK_TYPES or _full_name(base) in BLOCK_TYPES), None)


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
