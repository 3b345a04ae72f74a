"""The layer types that have a block, in one table; the next type is one class in one file and one row here."""

from __future__ import annotations

import inspect

from torch import nn

from kfac_dist.config.schema import Sharing
from kfac_dist.curvature.blocks.base import Block
from kfac_dist.curvature.blocks.layers.attention import AttentionBlock
from kfac_dist.curvature.blocks.layers.convolution import ConvolutionBlock
from kfac_dist.curvature.blocks.layers.embedding import EmbeddingBlock
from kfac_dist.curvature.blocks.layers.linear import InputFirstLinearBlock, LinearBlock
from kfac_dist.curvature.blocks.layers.norm import BatchNormBlock, GroupNormBlock, LayerNormBlock, SyncBatchNormBlock
from kfac_dist.curvature.blocks.layers.rms_norm import RMSNormBlock, is_rms_norm
from kfac_dist.curvature.blocks.layers.scaled import ScaledBlock, is_scaled
from kfac_dist.curvature.blocks.layers.transposed import TransposedConvolutionBlock
from kfac_dist.errors import ExtensionError

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
    nn.SyncBatchNorm: SyncBatchNormBlock,
}

# Block types registered from outside of the package.
REGISTERED: dict[type[nn.Module] | str, type[Block]] = {}
_TABLES = (BLOCK_TYPES, REGISTERED)


def add_block_type(layer_type: type[nn.Module] | str, block_type: type[Block]) -> None:
    """Add a row to the table; see `kfac_dist.extensions.register_block`.

    Raises:
        ExtensionError: The type has a block already, or an argument isn't a layer type or a block type.
    """
    if isinstance(layer_type, str):
        fits = len(layer_type.split(".")) > 1 and all(part.isidentifier() for part in layer_type.split("."))
        full = layer_type
    else:
        fits = isinstance(layer_type, type) and issubclass(layer_type, nn.Module)
        full = _full_name(layer_type) if isinstance(layer_type, type) else repr(layer_type)
    if not fits:
        raise ExtensionError(
            f"register_block: found the layer type {full}; expected a class that derives from torch.nn.Module, or its "
            "full name as 'package.module.Class'"
        )
    if not (isinstance(block_type, type) and issubclass(block_type, Block)):
        raise ExtensionError(
            f"register_block: found the block {block_type!r} for {full}; expected a class that derives from "
            "kfac_dist.extensions.KroneckerBlock or Block"
        )
    if inspect.isabstract(block_type):
        missing = ", ".join(sorted(block_type.__abstractmethods__))
        raise ExtensionError(f"register_block: {block_type.__name__} lacks methods: write {missing}")
    try:
        inspect.signature(block_type).bind("name", nn.Identity(), Sharing.EXPAND)
    except TypeError as error:
        raise ExtensionError(
            f"register_block: {block_type.__name__} can't be made of (name, module, sharing): {error}; write "
            "def __init__(self, name, module, sharing)"
        ) from None
    known = BLOCK_TYPES | REGISTERED
    for kind, block in known.items():
        if full == (kind if isinstance(kind, str) else _full_name(kind)):
            raise ExtensionError(
                f"register_block: {full} has {block.__name__} already: register each layer type once, or a class of "
                "your own that derives from it"
            )
    REGISTERED[layer_type] = block_type


def block_class(module: nn.Module) -> type[Block] | None:
    """Return the block of a module's type, or of the nearest type that it derives from; None if there is none.

    RMS norms of unknown classes, and other modules that scale their outputs, are recognised by their function.
    """
    base = covered_type(module)
    if base is not None:
        return next(table[key] for table in _TABLES for key in (base, _full_name(base)) if key in table)
    if is_rms_norm(module):
        return RMSNormBlock
    return ScaledBlock if is_scaled(module) else None


def covered_type(module: nn.Module) -> type[nn.Module] | None:
    """Return the type in the table that a module is of, or the nearest that it derives from; None if there is none."""
    kinds = type(module).__mro__
    return next((base for base in kinds if any(base in table or _full_name(base) in table for table in _TABLES)), None)


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
