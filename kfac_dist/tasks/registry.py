"""The models and data that ship with the package, by the names that a configuration uses."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from kfac_dist.config.schema import Target
from kfac_dist.config.yaml.targets import build_target
from kfac_dist.errors import DataError, ModelError
from kfac_dist.tasks import data, tokens
from kfac_dist.tasks.models.autoencoder import autoencoder
from kfac_dist.tasks.models.bert import bert
from kfac_dist.tasks.models.byte_gpt import byte_gpt
from kfac_dist.tasks.models.dcgan import dcgan
from kfac_dist.tasks.models.mlp import mlp
from kfac_dist.tasks.models.resnet import resnet20
from kfac_dist.tasks.models.translator import translator
from kfac_dist.tasks.translation import translations

MODELS: dict[str, Callable[..., nn.Module]] = {
    "autoencoder": autoencoder,
    "bert": bert,
    "byte_gpt": byte_gpt,
    "dcgan": dcgan,
    "mlp": mlp,
    "resnet20": resnet20,
    "translator": translator,
}

DATA: dict[str, Callable[..., data.DataSplits]] = {
    "byte_text": data.byte_text,
    "digits": data.digits,
    "digits_image": data.digits_image,
    "digits_tile": data.digits_tile,
    "masked_text": tokens.masked_text,
    "mnist5k": data.mnist5k,
    "random_tokens": tokens.random_tokens,
    "token_file": tokens.token_file,
    "translations": translations,
}


def build_model(target: Target) -> nn.Module:
    """Build the model that a configuration names.

    Raises:
        ConfigError: There is no such model, or it refuses its arguments.
        ModelError: The result is no `torch.nn.Module`.
    """
    model = build_target(target, MODELS, "model", nn.Module)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model.name: {target.name} returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def build_data(target: Target) -> data.DataSplits:
    """Build the data that a configuration names.

    Raises:
        ConfigError: There is no such data, or it refuses its arguments.
        DataError: The result is no `DataSplits`, or a package that it needs is missing.
    """
    splits = build_target(target, DATA, "data", data.DataSplits)
    if not isinstance(splits, data.DataSplits):
        raise DataError(
            f"data.name: {target.name} returned {type(splits).__name__}, "
            "expected kfac_dist.tasks.DataSplits(train, test)"
        )
    return splits
