"""First-order optimizers that take the (preconditioned) step."""

from kfac_dist.optimizers.first_order import build_optimizer, set_learning_rate

__all__ = ["build_optimizer", "set_learning_rate"]
