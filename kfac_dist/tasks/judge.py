"""The quality of samples by a small classifier that has learned the data's classes: two figures from one pass.

    score       exp E_x KL(p(y|x) ‖ p(y))                              1 … classes, more is better: each is of one
                (Salimans et al. 2016, with this classifier)           class, all of them of all
    distance    |μ − μ'|² + tr(Σ + Σ' − 2 (Σ^½ Σ' Σ^½)^½)              0 …, less is better: the Fréchet distance of the
                (Heusel et al. 2017, with its features)                features' normal distributions to held-out data's

Both are sums over samples, so that ranks share the work and add up. They compare runs on the same data with the same
judge, and nothing else: they are not the published figures, whose classifier has seen ImageNet.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from kfac_dist.errors import DataError

FEATURES = 32
_HIDDEN = 128
_EPOCHS = 25
_BATCH = 64


class Judge(nn.Module):
    """A classifier with `FEATURES` features below its logits.

    Args:
        shape: Of one sample.
        classes: Number of classes.
    """

    def __init__(self, shape: torch.Size, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(shape.numel(), _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, FEATURES), nn.GELU()
        )
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, samples: Tensor) -> Tensor:
        """Return logits `[batch, classes]`."""
        logits: Tensor = self.head(self.body(samples))
        return logits

    @property
    def sums_size(self) -> int:
        """Length of the result of `sums`."""
        return 2 + self.classes + FEATURES + FEATURES**2

    @torch.no_grad()
    def sums(self, samples: Tensor) -> Tensor:
        """Return the sums over samples that both scores are computed from: float64, 1-D, to be summed over ranks."""
        features = self.body(samples)
        log_p = functional.log_softmax(self.head(features), dim=1).double()
        features = features.double()
        p = log_p.exp()
        counted = torch.tensor([len(samples)], dtype=torch.float64, device=p.device)
        entropy = (p * log_p).sum().view(1)
        return torch.cat([counted, entropy, p.sum(0), features.sum(0), (features.T @ features).flatten()])

    @torch.no_grad()
    def accuracy(self, samples: Tensor, labels: Tensor) -> float:
        """Return the share of samples that it classifies correctly; waits for the device."""
        return float((self(samples).argmax(dim=1) == labels).double().mean())


def train_judge(samples: Tensor, labels: Tensor, seed: int) -> Judge:
    """Train a judge; the same data and seed give the same one, and the run's random state stays as it is.

    Args:
        samples: `[n, ...]`, on the device on which it will be used.
        labels: `[n]`, whole numbers from 0.
        seed: Seed of its weights and of the order of samples.

    Raises:
        DataError: The labels are no classes.
    """
    if labels.is_floating_point() or labels.ndim != 1 or int(labels.min()) < 0:
        raise DataError(
            f"a game's samples are judged by a classifier: the data's targets must be class labels, one whole number a "
            f"sample; found {str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
        )
    devices = [samples.device] if samples.is_cuda else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(seed)
        judge = Judge(samples.shape[1:], int(labels.max()) + 1).to(samples.device)
        optimizer = torch.optim.AdamW(judge.parameters(), lr=0.003, weight_decay=0.01)
        for _ in range(_EPOCHS):
            for rows in torch.randperm(len(samples)).to(samples.device).split(_BATCH):
                optimizer.zero_grad()
                functional.cross_entropy(judge(samples[rows]), labels[rows]).backward()
                optimizer.step()
    return judge.requires_grad_(False)


def score(sums: Tensor, classes: int) -> float:
    """Return the classifier's score of the samples that were summed, from 1 to the number of classes."""
    count, entropy, mean = sums[0], sums[1], sums[2 : 2 + classes] / sums[0]
    divergence = entropy / count - torch.special.xlogy(mean, mean).sum()
    return float(divergence.exp())


def frechet(sums: Tensor, reference: Tensor, classes: int) -> float:
    """Return the Fréchet distance between two sets of samples' features, each taken for normal."""
    (mean, covariance), (other_mean, other) = (_moments(values, classes) for values in (sums, reference))
    root = _root(covariance)
    # The trace of the root is all that is needed: the sum of the roots of the eigenvalues.
    middle = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
    apart = (mean - other_mean).square().sum() + covariance.trace() + other.trace() - 2 * middle
    return max(float(apart), 0.0)


def _moments(sums: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of the features."""
    count, start = sums[0], 2 + classes
    mean = sums[start : start + FEATURES] / count
    second = sums[start + FEATURES :].view(FEATURES, FEATURES) / count
    return mean, second - torch.outer(mean, mean)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root
