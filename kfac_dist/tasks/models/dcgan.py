"""A DCGAN (Radford et al. 2016) for images of 16×16: transposed convolutions up, strided ones down.

Without BatchNorm, which would couple the samples of a batch, and real with made ones, and make a step depend on how
many ranks share it. Without it, orthogonal weights keep the signals' size.

    noise ─ Linear ─ 4×4×2w ─ ConvTranspose ─ 8×8×w ─ ConvTranspose ─ 16×16×1 ─ tanh
    image ─ Conv ─ 8×8×w ─ Conv ─ 4×4×2w ─ Linear ─ logit
"""

from __future__ import annotations

import math

from torch import nn

from kfac_dist.tasks.game import TwoPlayers

# Of LeakyReLU, as in the paper.
SLOPE = 0.2


def dcgan(latent: int = 32, width: int = 16, channels: int = 1) -> TwoPlayers:
    """Build both players for images `[batch, channels, 16, 16]` of values in [−1, 1].

    Args:
        latent: Width of the noise.
        width: Channels next to the image; twice as many at 4×4.
        channels: Channels of the images.

    Raises:
        ValueError: A width is not positive.
    """
    if min(latent, width, channels) < 1:
        raise ValueError(f"latent, width and channels must be positive; found {latent}, {width} and {channels}")
    generator = nn.Sequential(
        nn.Linear(latent, 2 * width * 16),
        nn.LeakyReLU(SLOPE),
        nn.Unflatten(1, (2 * width, 4, 4)),
        nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
        nn.LeakyReLU(SLOPE),
        nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1),
        nn.Tanh(),
    )
    discriminator = nn.Sequential(
        nn.Conv2d(channels, width, 4, stride=2, padding=1),
        nn.LeakyReLU(SLOPE),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
        nn.LeakyReLU(SLOPE),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 1),
    )
    gain = math.sqrt(2 / (1 + SLOPE**2))
    for player in (generator, discriminator):
        for module in player.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                nn.init.orthogonal_(module.weight, gain)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
    return TwoPlayers(generator, discriminator, latent)
