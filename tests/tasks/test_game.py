"""Games: noise that no number of ranks changes, losses against each other, and a judge of samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kfac_dist.config.schema import Objective
from kfac_dist.errors import DataError
from kfac_dist.tasks.data import digits_tile
from kfac_dist.tasks.game import discriminator_total, game_noise, generator_total
from kfac_dist.tasks.judge import FEATURES, Judge, frechet, score, train_judge
from kfac_dist.tasks.models.dcgan import dcgan


def test_noise_is_a_function_of_seed_and_step() -> None:
    assert torch.equal(game_noise(1, 5, 8, 3), game_noise(1, 5, 8, 3))
    drawn = [game_noise(seed, step, 8, 3) for seed in (0, 1, 2**40) for step in (-1, 0, 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert game_noise(0, 0, 4000, 4).std() == pytest.approx(1, abs=0.02)


def test_the_losses_are_those_of_the_two_player_game() -> None:
    logits = torch.tensor([[0.3, -1.2], [2.0, 0.7]], dtype=torch.float64)
    real, made = logits.sigmoid().unbind(1)
    torch.testing.assert_close(discriminator_total(logits), -(real.log() + (1 - made).log()).sum())
    torch.testing.assert_close(generator_total(logits, Objective.NON_SATURATING), -made.log().sum())
    # Minimax is zero-sum: what the generator wins, the discriminator loses of the made samples.
    torch.testing.assert_close(generator_total(logits, Objective.MINIMAX), (1 - made).log().sum())


def test_the_dcgan_makes_images_and_judges_them_near_even_odds_at_first() -> None:
    torch.manual_seed(0)
    game = dcgan(latent=8, width=4)
    images = game.generator(game_noise(0, 0, 64, 8))
    assert images.shape == (64, 1, 16, 16)
    assert images.abs().max() <= 1
    assert 0.1 < images.std() < 0.9
    logits = game(images)
    assert logits.shape == (64, 2)
    assert logits.std() < 3
    with pytest.raises(ValueError, match="must be positive; found 8, 0 and 1"):
        dcgan(latent=8, width=0)


def test_a_look_at_the_players_without_a_game_is_the_same_in_a_batch_and_alone() -> None:
    """`kfac-dist doctor` compares the two: noise by places in a batch would look like BatchNorm's coupling."""
    torch.manual_seed(0)
    game, real = dcgan(latent=8, width=4), torch.rand(5, 1, 16, 16)
    together = game(real)
    torch.testing.assert_close(torch.cat([game(sample[None]) for sample in real]), together)
    assert len(together[:, 1].unique()) == 5


def test_tiles_are_digits_between_minus_one_and_one() -> None:
    splits = digits_tile()
    images, labels = splits.train.tensors
    assert images.shape[1:] == (1, 16, 16)
    assert (images.min(), images.max()) == (-1, 1)
    assert sorted(labels.unique().tolist()) == list(range(10))
    with pytest.raises(DataError, match="size is 4; it must be at least 8"):
        digits_tile(size=4)


def blobs(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % 4
    centres = 4 * torch.eye(4)
    return centres[labels] + 0.3 * torch.randn(samples, 4, generator=draw), labels


def test_a_judge_tells_real_from_collapsed_and_from_noise() -> None:
    samples, labels = blobs(400, 0)
    judge = train_judge(samples, labels, seed=0)
    others, their_labels = blobs(200, 1)
    assert judge.accuracy(others, their_labels) == 1
    reference = judge.sums(others)
    figures = {}
    sets = {"real": samples[:200], "collapsed": samples[:200][labels[:200] == 0], "noise": torch.randn(200, 4)}
    for name, made in sets.items():
        sums = judge.sums(made)
        figures[name] = (score(sums, 4), frechet(sums, reference, 4))
    assert figures["real"][0] == pytest.approx(4, abs=0.1)
    assert figures["collapsed"][0] == pytest.approx(1, abs=0.05)
    assert figures["real"][1] < figures["noise"][1] / 10
    assert figures["real"][1] < figures["collapsed"][1] / 10
    assert frechet(reference, reference, 4) == pytest.approx(0, abs=1e-6)


def test_the_distance_of_two_normals_is_frechets_and_sums_add_up() -> None:
    judge = Judge(torch.Size([3]), 2).double()
    samples = torch.randn(300, 3, dtype=torch.float64)
    other = 0.5 * torch.randn(200, 3, dtype=torch.float64) + 1
    torch.testing.assert_close(judge.sums(samples[:100]) + judge.sums(samples[100:]), judge.sums(samples))
    first, second = (judge.body(part).detach() for part in (samples, other))
    means = [part.mean(0) for part in (first, second)]
    covariances = [
        (part - mean).T @ (part - mean) / len(part) for part, mean in zip((first, second), means, strict=True)
    ]
    # The paper's form, by the eigenvalues of the product, which is not symmetric.
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    wanted = (means[0] - means[1]).square().sum() + sum(c.trace() for c in covariances) - 2 * roots
    assert frechet(judge.sums(samples), judge.sums(other), 2) == pytest.approx(float(wanted), rel=1e-4)
    assert judge.sums(samples).numel() == judge.sums_size == 4 + FEATURES + FEATURES**2


def test_a_judge_is_its_seeds_and_leaves_the_runs_random_numbers_alone() -> None:
    samples, labels = blobs(80, 0)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    one = train_judge(samples, labels, seed=0)
    assert torch.equal(torch.rand(4), expected)
    again, other = train_judge(samples, labels, seed=0), train_judge(samples, labels, seed=1)
    assert torch.equal(one.head.weight, again.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    assert not any(p.requires_grad for p in one.parameters())
    with pytest.raises(DataError, match="targets must be class labels"):
        train_judge(samples, samples, seed=0)


def test_a_judge_that_knows_nothing_scores_one() -> None:
    judge = Judge(torch.Size([3]), 5)
    for parameter in judge.parameters():
        torch.nn.init.zeros_(parameter)
    assert score(judge.sums(torch.randn(50, 3)), 5) == pytest.approx(1)
    assert math.isfinite(frechet(judge.sums(torch.randn(50, 3)), judge.sums(torch.randn(50, 3)), 5))
