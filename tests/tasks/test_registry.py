"""Names in a configuration become models and data, or a message that says what was found instead."""

from __future__ import annotations

import pytest

from kfac_dist.config.schema import Target
from kfac_dist.errors import ConfigError, DataError, ModelError
from kfac_dist.tasks import DataSplits, build_data, build_model
from kfac_dist.tasks.models.resnet import ResNet


def test_shipped_names_and_the_users_own() -> None:
    assert isinstance(build_model(Target(name="resnet20", args={"width": 4})), ResNet)
    assert isinstance(build_data(Target(name="digits")), DataSplits)
    own = build_model(Target(name="torch.nn:Linear", args={"in_features": 2, "out_features": 3}))
    assert sum(parameter.numel() for parameter in own.parameters()) == 9


def nothing_of_the_kind():  # type: ignore[no-untyped-def]
    return {}


def test_what_is_no_model_or_no_data_is_named() -> None:
    name = f"{__name__}:nothing_of_the_kind"
    with pytest.raises(ModelError, match=r"nothing_of_the_kind returned dict, expected a torch\.nn\.Module"):
        build_model(Target(name=name))
    with pytest.raises(DataError, match=r"nothing_of_the_kind returned dict, expected kfac_dist\.tasks\.DataSplits"):
        build_data(Target(name=name))
    with pytest.raises(ConfigError, match=r"model.name: found 'builtins:dict', which no torch's Module can come from"):
        build_model(Target(name="builtins:dict"))
    with pytest.raises(ConfigError, match=r"data.name: .* is not called: it is part of Python"):
        build_data(Target(name="builtins:dict"))


def test_arguments_that_a_model_refuses_are_the_configurations_fault() -> None:
    with pytest.raises(ConfigError, match=r"model\.args: byte_gpt refuses them: width \(10\) must be a multiple"):
        build_model(Target(name="byte_gpt", args={"width": 10}))
