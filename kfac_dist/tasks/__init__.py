"""Models, data and losses of the shipped runs, and the interfaces for the user's own."""

from kfac_dist.tasks.data import DataSplits
from kfac_dist.tasks.game import TwoPlayers
from kfac_dist.tasks.losses import Loss, build_loss
from kfac_dist.tasks.registry import DATA, MODELS, build_data, build_model

__all__ = ["DATA", "MODELS", "DataSplits", "Loss", "TwoPlayers", "build_data", "build_loss", "build_model"]
