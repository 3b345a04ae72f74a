"""Two players that learn against each other: a generator makes samples of noise, a discriminator tells them from data.

Losses are sums over the pairs of a batch, one real sample and one made, so that a step's mean runs over its real
samples. With s = (s_real, s_made) the discriminator's logits of a pair:

    discriminator    −log σ(s_real) − log σ(−s_made)      a Bernoulli likelihood of two outputs
    generator        −log σ(s_made)                       non-saturating (Goodfellow et al. 2014)
                     log σ(−s_made)                       minimax: the negative of the discriminator's loss
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.nn import functional

from kfac_dist.config.schema import Objective


class TwoPlayers(nn.Module):
    """A generator and a discriminator: the `model` of a configuration with a `game`.

    Args:
        generator: From noise `[batch, latent]` to samples like the data's.
        discriminator: From samples to one logit each, `[batch]` or `[batch, 1]`: positive for real ones.
        latent: Width of the noise, unit normal.
    """

    def __init__(self, generator: nn.Module, discriminator: nn.Module, latent: int) -> None:
        super().__init__()
        self.generator = generator
        self.discriminator = discriminator
        self.latent = latent

    def forward(self, real: Tensor) -> Tensor:
        """Return the logits `[batch, 2]` of real samples and of as many made of noise that the real ones determine.

        For a look at the model without a game: a sample's logits are the same in a batch and alone.
        """
        pixels = functional.normalize(real.flatten(1), dim=1)
        noise = pixels @ game_noise(0, 0, pixels.shape[1], self.latent).to(real)
        return self.logits(real, self.generator(noise))

    def logits(self, real: Tensor, made: Tensor) -> Tensor:
        """Return the discriminator's logits of each pair, `[batch, 2]`: two uses of it, one a pass."""
        return torch.stack([self.discriminator(real).reshape(-1), self.discriminator(made).reshape(-1)], dim=1)


def game_noise(seed: int, step: int, samples: int, latent: int) -> Tensor:
    """Return the noise of one step's global batch, `[samples, latent]`: a pure function of its arguments.

    Ranks take their rows of it, so that their number doesn't matter, and a resumed run finds the same.
    """
    # A digest, because torch's CPU generator reads 32 bits of its seed: those of seed and step together.
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=4).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    return torch.randn(samples, latent, generator=generator)


def discriminator_total(logits: Tensor) -> Tensor:
    """Return the discriminator's loss, summed over pairs `[batch, 2]`."""
    labels = torch.zeros_like(logits)
    labels[:, 0] = 1
    return functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")


def generator_total(logits: Tensor, objective: Objective) -> Tensor:
    """Return the generator's loss, summed over pairs `[batch, 2]`."""
    made = logits[:, 1]
    match objective:
        case Objective.NON_SATURATING:
            return functional.softplus(-made).sum()
        case Objective.MINIMAX:
            return -functional.softplus(made).sum()
