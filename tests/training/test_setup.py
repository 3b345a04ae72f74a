"""From a configuration to the parts of a run."""

from __future__ import annotations

import pytest

from kfac_dist.config.schema import ClassConditionalConfig, CurvatureConfig, KFACConfig
from kfac_dist.errors import ConfigError
from kfac_dist.training.setup import with_classes


def _kfac(classes: int | None) -> KFACConfig:
    return KFACConfig(curvature=CurvatureConfig(class_conditional=ClassConditionalConfig(classes=classes)))


@pytest.mark.parametrize("said", [None, 4])
def test_there_are_as_many_classes_as_the_model_has_outputs(said: int | None) -> None:
    by_class = with_classes(_kfac(said), 4).curvature.class_conditional
    assert by_class is not None
    assert by_class.classes == 4


@pytest.mark.parametrize("said", [3, 5])
def test_another_number_of_classes_is_refused(said: int) -> None:
    with pytest.raises(ConfigError, match=rf"classes is {said}, but the model has 4 outputs a term.*set it to 4"):
        with_classes(_kfac(said), 4)
