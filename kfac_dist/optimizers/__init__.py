"""Steps: first-order optimizers, and solvers that find the step from the quadratic model of the loss."""

from kfac_dist.optimizers.build import build_stepper
from kfac_dist.optimizers.first_order import build_optimizer, set_learning_rate
from kfac_dist.optimizers.stepper import Stepper

__all__ = ["Stepper", "build_optimizer", "build_stepper", "set_learning_rate"]
