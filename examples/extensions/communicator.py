"""A communicator that counts: torch's, with the number and the bytes of K-FAC's collectives, by kind and content.

extensions: [examples.extensions.communicator]
kfac:
  distribution: {backend: counted}

torchrun --standalone --nproc-per-node 2 -m examples.extensions.communicator
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kfac_dist import KFAC
from kfac_dist.extensions import TorchCommunicator, Work, register_communicator

COLLECTIVES: Counter[tuple[str, str]] = Counter()
BYTES: Counter[tuple[str, str]] = Counter()


class CountedCommunicator(TorchCommunicator):
    """Its splits count, too: they are of the same class."""

    def all_reduce(self, tensor: Tensor, *, label: str) -> Work:
        """See `Communicator.all_reduce`."""
        COLLECTIVES["all_reduce", label] += 1
        BYTES["all_reduce", label] += tensor.nbytes
        return super().all_reduce(tensor, label=label)

    def broadcast(self, tensor: Tensor, root: int, *, label: str) -> Work:
        """See `Communicator.broadcast`."""
        COLLECTIVES["broadcast", label] += 1
        BYTES["broadcast", label] += tensor.nbytes
        return super().broadcast(tensor, root, label=label)


register_communicator("counted", CountedCommunicator.create, api_version=1)


def main() -> None:
    """Count the collectives of one step."""
    dist.init_process_group("gloo")
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    kfac = KFAC(model, {"distribution": {"backend": "counted"}, "update": {"kl_clip": None}})
    model(torch.randn(16, 4)).square().mean().backward()
    kfac.step()
    if dist.get_rank() == 0:
        for (kind, label), count in COLLECTIVES.items():
            print(f"{kind} of {label}: {count}, {BYTES[kind, label]} bytes")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
