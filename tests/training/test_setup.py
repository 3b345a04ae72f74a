"""From a configuration to the parts of a run."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from kfac_dist.config.schema import ClassConditionalConfig, CurvatureConfig, KFACConfig
from kfac_dist.errors import CollectiveError, ConfigError
from kfac_dist.tasks import DataSplits
from kfac_dist.training import train
from kfac_dist.training.setup import with_classes
from tests.distributed.startup.test_bootstrap import free_port
from tests.harness import run_ranks
from tests.training.runs import launched, random_pixels, small_config


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


def slow_pixels() -> DataSplits:
    """Keeps one rank reading for longer than the others wait."""
    if os.environ["RANK"] == "1":
        time.sleep(4)
    return random_pixels()


def _wait_for_data(directory: str, port: int) -> str:
    os.environ.update(launched(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), port))
    config = small_config(directory, run={"timeout_seconds": 2}, data={"name": "tests.training.test_setup:slow_pixels"})
    with pytest.raises(CollectiveError) as caught:
        train(config, quiet=True)
    return str(caught.value)


def test_a_rank_that_keeps_the_others_waiting_before_the_first_step_is_named(tmp_path: Path) -> None:
    said = run_ranks(3, _wait_for_data, str(tmp_path), free_port(), process_group=False)
    for rank in (0, 2):
        assert "rank 1 in reading the data" in said[rank]
        assert said[rank].count("waiting: ") == 1
