"""K-FAC's own passes send back what the Fisher is made of, column by column with its terms' classes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfac_dist.config.kfac.curvature import ClassConditionalConfig, CurvatureConfig, Fisher, Likelihood
from kfac_dist.errors import ModelError
from kfac_dist.preconditioner.measure.own_passes import OwnPasses

CLASSES, SAMPLES = 3, 4


@pytest.fixture
def outputs() -> Tensor:
    return torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(0))


def passes(fisher: Fisher, classes: int | None = None) -> OwnPasses:
    by_class = None if classes is None else ClassConditionalConfig(classes=classes)
    return OwnPasses(CurvatureConfig(fisher=fisher, likelihood=Likelihood.CATEGORICAL, class_conditional=by_class))


def test_the_columns_of_type2_are_a_square_root_of_the_hessian(outputs: Tensor) -> None:
    found = torch.stack(list(passes(Fisher.TYPE2).columns(outputs, 0, 0)), dim=-1)
    p = outputs.softmax(-1)
    torch.testing.assert_close(found @ found.mT, torch.diag_embed(p) - p[:, :, None] * p[:, None])


def test_a_drawn_gradient_depends_on_step_and_sample_alone(outputs: Tensor) -> None:
    own = passes(Fisher.MC)
    [found] = own.columns(outputs, 5, 8)
    labels = (outputs.softmax(-1) - found).round()
    assert labels.sum(-1).tolist() == [1.0] * SAMPLES
    later = torch.cat(
        [next(iter(own.columns(outputs[part], 5, 8 + part.start))) for part in (slice(0, 1), slice(1, 4))]
    )
    assert torch.equal(found, later), "however samples are cut into micro-batches"
    assert torch.equal(own.drawn_labels(outputs, 5, 8), found)
    other_steps = [own.drawn_labels(outputs, step, 8) for step in range(6, 12)]
    assert not all(torch.equal(found, other) for other in other_steps)


def test_the_classes_of_a_column_are_those_of_its_terms(outputs: Tensor) -> None:
    assert list(passes(Fisher.MC).classes(outputs, 5, 8)) == []
    own = passes(Fisher.MC, CLASSES)
    [classes] = own.classes(outputs, 5, 8)
    labels = (outputs.softmax(-1) - own.drawn_labels(outputs, 5, 8)).argmax(-1)
    assert classes.labels is not None
    assert classes.labels.flatten().tolist() == labels.tolist()

    by_column = list(passes(Fisher.TYPE2, CLASSES).classes(outputs, 0, 0))
    assert [each.index for each in by_column] == [0, 1, 2]
    shares = torch.stack([each.shares for each in by_column if each.shares is not None], dim=-1)
    torch.testing.assert_close(shares, outputs.softmax(-1))


def test_another_number_of_outputs_is_refused(outputs: Tensor) -> None:
    with pytest.raises(ModelError, match="classes is 5, but the model has 3 outputs a term, and fisher mc"):
        list(passes(Fisher.MC, 5).classes(outputs, 0, 0))
