"""A run from its configuration to its result."""

from kfac_dist.training.run import TrainResult, train

__all__ = ["TrainResult", "train"]
