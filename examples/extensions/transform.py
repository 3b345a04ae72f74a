"""A transform: heavy-ball momentum of each layer's gradient at its owner, before curvature (Polyak 1964).

extensions: [examples.extensions.transform]
kfac:
  update:
    transforms: {heavy_ball: {decay: 0.9}}

python -m examples.extensions.transform
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kfac_dist.extensions import Stack, Stage, State, Transform, register_transform


class HeavyBall(Transform):
    """M ← decay · M + ∇, in place of ∇."""

    stage = Stage.GRADIENT
    whole_matrix = False

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay

    def initial(self, gradient: Tensor) -> dict[str, Tensor]:
        """Return M = 0."""
        return {"momentum": torch.zeros_like(gradient)}

    def apply(self, update: Tensor, stack: Stack, state: State) -> Tensor:
        """Return M."""
        state["momentum"] = self.decay * state["momentum"] + update
        return state["momentum"]


register_transform("heavy_ball", HeavyBall, api_version=1)


def main() -> None:
    """Print the loss of a regression, step by step."""
    from kfac_dist import KFAC

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    kfac = KFAC(model, {"update": {"transforms": {"heavy_ball": {"decay": 0.8}}}}, optimizer=optimizer)
    inputs = torch.randn(64, 8)
    for _ in range(20):
        loss = (model(inputs) - inputs.prod(1, keepdim=True)).square().mean()
        loss.backward()
        kfac.step()
        optimizer.step()
        optimizer.zero_grad()
        print(f"{loss.item():.4f}")


if __name__ == "__main__":
    main()
