"""The shipped models: shapes, sizes, and starting points at which nothing explodes or vanishes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from kfac_dist.tasks.models.autoencoder import autoencoder
from kfac_dist.tasks.models.byte_gpt import byte_gpt
from kfac_dist.tasks.models.resnet import resnet20


def test_autoencoder_mirrors_its_widths_around_a_linear_code() -> None:
    model = autoencoder([64, 100, 50, 25, 8])
    widths = [layer.out_features for layer in model if isinstance(layer, nn.Linear)]
    assert widths == [100, 50, 25, 8, 25, 50, 100, 64]
    assert sum(isinstance(layer, nn.Tanh) for layer in model) == 6
    kinds = [type(layer).__name__ for layer in model]
    assert "LinearLinear" in "".join(kinds)
    assert kinds[-1] == "Linear"
    assert model(torch.rand(3, 64)).shape == (3, 64)


def test_sparse_initialization_connects_fifteen_inputs() -> None:
    model = autoencoder([40, 30, 10], initialization="sparse")
    connected = [(layer.weight != 0).sum(1).unique().tolist() for layer in model if isinstance(layer, nn.Linear)]
    assert connected == [[15], [15], [10], [15]]


@pytest.mark.parametrize("initialization", ["glorot", "sparse"])
def test_autoencoder_activations_keep_their_scale(initialization: str) -> None:
    torch.manual_seed(0)
    model = autoencoder([64, 100, 50, 25, 8], initialization=initialization)  # type: ignore[arg-type]
    assert 0.1 < model(torch.randn(256, 64)).std() < 10


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"dims": [3]}, "at least an input and a code"),
        ({"dims": [3, 2], "activation": "cos"}, "'cos' is not one of tanh, sigmoid, relu, gelu"),
        ({"dims": [3, 2], "initialization": "zero"}, "'zero' is not one of glorot, sparse"),
    ],
)
def test_bad_autoencoders_are_refused(args: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        autoencoder(**args)  # type: ignore[arg-type]


def test_resnet20_has_twenty_layers_and_the_published_size() -> None:
    model = resnet20()
    weights = [
        m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "shortcut" not in name
    ]
    assert len(weights) == 20
    size = sum(parameter.numel() for name, parameter in model.named_parameters() if "shortcut" not in name)
    assert size == 269_722  # 0.27 M in He et al. 2016, table 6
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_gpt_is_causal_and_starts_at_the_uniform_guess() -> None:
    torch.manual_seed(0)
    model = byte_gpt(layers=2, width=32, heads=2, context=16)
    tokens = torch.randint(256, (3, 16))
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10], after[:, 10])
    loss = functional.cross_entropy(before.flatten(0, 1), tokens.flatten())
    assert abs(loss.item() - math.log(256)) < 0.2


def test_gpt_heads_must_divide_its_width() -> None:
    with pytest.raises(ValueError, match=r"width \(30\) must be a multiple of heads \(4\)"):
        byte_gpt(width=30)
