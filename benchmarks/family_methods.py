"""The methods that `benchmarks.family` compares: how each is built, and the grid from which its trials are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.trials import Grid
from benchmarks.workloads import reconstruction
from kfac_dist import KFAC
from kfac_dist.optimizers import build_stepper
from kfac_dist.optimizers.dissected import MSVAG

Setting = dict[str, Any]


class Stepper(Protocol):
    """The steps of a training."""

    def scale_lr(self, share: float) -> None:
        """Set the learning rate to a share of its start."""

    def step(self, batch: Tensor) -> None:
        """Take one step on a batch."""


class FirstOrder:
    """Steps by torch optimizers, with K-FAC before them if there is one."""

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], kfac: KFAC | None = None) -> None:
        self._model = model
        self._optimizers = optimizers
        self._kfac = kfac
        self._starts = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    def scale_lr(self, share: float) -> None:
        for optimizer, starts in zip(self._optimizers, self._starts, strict=True):
            for group, start in zip(optimizer.param_groups, starts, strict=True):
                group["lr"] = start * share

    def step(self, batch: Tensor) -> None:
        self._model.zero_grad()
        outputs = self._model(batch)
        if self._kfac is not None:
            self._kfac.fisher_backward(outputs)
        reconstruction(outputs, batch).backward()
        if self._kfac is not None:
            self._kfac.step()
        for optimizer in self._optimizers:
            optimizer.step()


class Solved:
    """Steps that a solver of K-FAC finds from the quadratic model of the batch's loss."""

    def __init__(self, model: nn.Module, config: dict[str, Any]) -> None:
        self._model = model
        self._kfac = KFAC(model, config)
        self._stepper = build_stepper(self._kfac, summed_reconstruction)

    def scale_lr(self, share: float) -> None:
        """The solver finds the length of its steps, too."""

    def step(self, batch: Tensor) -> None:
        self._model.zero_grad()
        self._stepper.micro_batch(batch, batch)
        outputs = self._model(batch)
        self._kfac.fisher_backward(outputs)
        reconstruction(outputs, batch).backward()
        self._stepper.step()


def summed_reconstruction(outputs: Tensor, inputs: Tensor) -> Tensor:
    return reconstruction(outputs, inputs) * len(inputs)


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        title: Its name in tables.
        build: Makes its stepper for a model and a setting.
        grids: For each task, the values from which trials are drawn.
        package: Its package, if not torch or this one.
        own: Whether it is of this package.
    """

    title: str
    build: Callable[[nn.Module, Setting], Stepper]
    grids: dict[str, Grid]
    package: str | None = None
    own: bool = False

    def installed(self) -> bool:
        return self.package is None or find_spec(self.package.replace("-", "_")) is not None


# ---- first-order methods, and those of other packages


def sgd(model: nn.Module, setting: Setting) -> Stepper:
    options = {"lr": setting["lr"], "momentum": setting["momentum"], "nesterov": True, "foreach": True}
    return FirstOrder(model, [torch.optim.SGD(model.parameters(), **options)])


def adamw(model: nn.Module, setting: Setting) -> Stepper:
    betas = (0.9, setting["beta2"])
    options = {"lr": setting["lr"], "betas": betas, "weight_decay": 0.0, "foreach": True}
    return FirstOrder(model, [torch.optim.AdamW(model.parameters(), **options)])


def muon(model: nn.Module, setting: Setting) -> Stepper:
    """Muon for the matrices, AdamW for the biases, as its authors use it."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    rest = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    return FirstOrder(
        model,
        [
            torch.optim.Muon(matrices, lr=setting["lr"], momentum=setting["momentum"], weight_decay=0.0),
            torch.optim.AdamW(rest, lr=setting["rest_lr"], weight_decay=0.0),
        ],
    )


def soap(model: nn.Module, setting: Setting) -> Stepper:
    import pytorch_optimizer

    optimizer = pytorch_optimizer.SOAP(
        model.parameters(),
        lr=setting["lr"],
        betas=(0.95, setting["beta2"]),
        weight_decay=0.0,
        precondition_frequency=setting["every"],
    )
    return FirstOrder(model, [optimizer])


def shampoo(model: nn.Module, setting: Setting) -> Stepper:
    import pytorch_optimizer

    optimizer = pytorch_optimizer.ScalableShampoo(
        model.parameters(),
        lr=setting["lr"],
        betas=(0.9, setting["beta2"]),
        start_preconditioning_step=setting["every"],
        preconditioning_compute_steps=setting["every"],
        block_size=1024,
    )
    return FirstOrder(model, [optimizer])


def msvag(model: nn.Module, setting: Setting) -> Stepper:
    return FirstOrder(model, [MSVAG(model.parameters(), lr=setting["lr"], beta=setting["beta"])])


# ---- K-FAC before a first-order optimizer


def kfac_config(setting: Setting, **inversion: Any) -> dict[str, Any]:
    """Return the `kfac` section of a setting."""
    factor_every, inverse_every = setting["intervals"]
    return {
        "curvature": {
            "fisher": "mc",
            "likelihood": "bernoulli",
            "factor_every": factor_every,
            "decay": setting["decay"],
        },
        "inversion": {
            "inverse_every": inverse_every,
            "damping": setting["damping"],
            "early_refresh": setting["early_refresh"],
            "inverse_dtype": setting["inverse_dtype"],
            **inversion,
        },
        "update": {
            "kl_clip": setting.get("kl_clip"),
            "kl_clip_lr": setting["lr"] if "kl_clip" in setting else "current",
        },
    }


def with_sgd(**inversion: Any) -> Callable[[nn.Module, Setting], Stepper]:
    """Return the builder of K-FAC with momentum SGD after it."""

    def build(model: nn.Module, setting: Setting) -> Stepper:
        optimizer = torch.optim.SGD(model.parameters(), lr=setting["lr"], momentum=setting["momentum"], foreach=True)
        return FirstOrder(model, [optimizer], KFAC(model, kfac_config(setting, **inversion), optimizer=optimizer))

    return build


def cg(model: nn.Module, setting: Setting) -> Stepper:
    """K-FAC CG; the loss is so convex in its outputs that its step may be long."""
    options = {"lr": setting["lr"], "max_iterations": setting["iterations"], "window": 5}
    return Solved(model, kfac_config(setting) | {"solver": "cg", "cg": options})


def newton(**inversion: Any) -> Callable[[nn.Module, Setting], Stepper]:
    """Return the builder of K-FAC Newton: momentum, steps' length, λ and γ are its own; batches stay as they are."""

    def build(model: nn.Module, setting: Setting) -> Stepper:
        options = {"solver": "newton", "newton": {"gamma_every": setting["intervals"][1]}}
        return Solved(model, kfac_config(setting, **inversion) | options)

    return build


def block_kfac(model: nn.Module, setting: Setting) -> Stepper:
    """K-FAC whose factors are cut into blocks of half the widest layer at most."""
    widest = max(parameter.shape[1] for parameter in model.parameters() if parameter.ndim == 2)
    return with_sgd(max_factor_dim=widest // 2)(model, setting)


SGD_GRIDS: dict[str, Grid] = {
    "digits": {"lr": [0.003, 0.01, 0.03, 0.1], "momentum": [0.9, 0.95, 0.99], "final": [0.01, 0.1]},
    "mnist5k": {"lr": [0.002, 0.003, 0.004, 0.006], "momentum": [0.9, 0.8, 0.95], "final": [0.01, 0.1]},
}
ADAMW_GRIDS: dict[str, Grid] = {
    "digits": {"lr": [0.002, 0.004, 0.008, 0.016, 0.032], "beta2": [0.95, 0.99, 0.999], "final": [0.01, 0.1]},
    "mnist5k": {"lr": [0.0003, 0.0005, 0.001, 0.002], "beta2": [0.95, 0.99, 0.999], "final": [0.01, 0.1]},
}
MUON_GRIDS: dict[str, Grid] = {
    "digits": {"lr": [0.02, 0.05, 0.1], "momentum": [0.8, 0.9, 0.95], "rest_lr": [0.002, 0.008], "final": [0.1]},
    "mnist5k": {"lr": [0.005, 0.01, 0.02, 0.05], "momentum": [0.9, 0.95], "rest_lr": [0.0005, 0.002], "final": [0.1]},
}
SOAP_GRIDS: dict[str, Grid] = {
    "digits": {"lr": [0.004, 0.008, 0.016, 0.032], "beta2": [0.8, 0.9, 0.95], "every": [10, 50], "final": [0.1]},
    "mnist5k": {"lr": [0.0005, 0.001, 0.002, 0.004], "beta2": [0.9, 0.95], "every": [50, 100], "final": [0.1]},
}
SHAMPOO_GRIDS: dict[str, Grid] = {
    "digits": {"lr": [0.01, 0.03, 0.1, 0.3], "beta2": [0.95, 0.99], "every": [10, 50], "final": [0.1]},
    "mnist5k": {"lr": [0.003, 0.006, 0.01, 0.03], "beta2": [0.95, 0.99], "every": [50, 100], "final": [0.1]},
}
KFAC_GRIDS: dict[str, Grid] = {
    "digits": {
        "lr": [0.05, 0.1, 0.2],
        "momentum": [0.8, 0.9],
        "damping": [0.003, 0.01, 0.03],
        "kl_clip": [0.03, 0.1],
        "decay": [0.8],
        "intervals": [(5, 20), (5, 50), (10, 50)],
        "early_refresh": [10],
        "inverse_dtype": ["float32"],
    },
    "mnist5k": {
        "lr": [0.1, 0.2],
        "momentum": [0.8],
        "damping": [0.03, 0.1],
        "kl_clip": [0.03, 0.1],
        "decay": [0.8],
        "intervals": [(10, 50), (10, 100)],
        "early_refresh": [1],
        "inverse_dtype": ["bfloat16"],
    },
}

# Exact damping adds λ to products of eigenvalues, of which many are next to nothing.
EIGEN_GRIDS = {
    "digits": KFAC_GRIDS["digits"] | {"damping": [0.01, 0.03, 0.1]},
    "mnist5k": KFAC_GRIDS["mnist5k"] | {"damping": [0.03, 0.1]},
}
MSVAG_GRIDS: dict[str, Grid] = {
    "digits": {"lr": [0.01, 0.03, 0.1, 0.3], "beta": [0.9, 0.95, 0.99], "final": [0.1]},
    "mnist5k": {"lr": [0.003, 0.006, 0.01, 0.03], "beta": [0.9, 0.95], "final": [0.1]},
}
CG_GRIDS: dict[str, Grid] = {
    "digits": {
        "lr": [0.3, 0.5, 1.0],
        "damping": [0.003, 0.01, 0.03],
        "iterations": [5, 10, 20],
        "batch": [256, 512],
        "decay": [0.8],
        "intervals": [(5, 20)],
        "early_refresh": [10],
        "inverse_dtype": ["float32"],
    },
    "mnist5k": {
        "lr": [0.3, 0.5, 1.0],
        "damping": [0.03, 0.1],
        "iterations": [5, 10],
        "batch": [256, 512],
        "decay": [0.8],
        "intervals": [(10, 50)],
        "early_refresh": [1],
        "inverse_dtype": ["float32"],
    },
}

NEWTON_GRIDS: dict[str, Grid] = {
    "digits": {
        "damping": [0.005, 0.02, 0.2],
        "batch": [256, 512, 1024],
        "decay": [0.8, 0.95],
        "intervals": [(1, 20), (5, 20)],
        "early_refresh": [1],
        "inverse_dtype": ["float32"],
    },
    "mnist5k": {
        "damping": [0.1, 1.0],
        "batch": [512, 1024],
        "decay": [0.8, 0.95],
        "intervals": [(5, 20), (10, 50)],
        "early_refresh": [1],
        "inverse_dtype": ["float32"],
    },
}

METHODS: dict[str, Method] = {
    "sgd": Method("SGD-Nesterov", sgd, SGD_GRIDS),
    "adamw": Method("AdamW", adamw, ADAMW_GRIDS),
    "muon": Method("Muon", muon, MUON_GRIDS),
    "soap": Method("SOAP", soap, SOAP_GRIDS, package="pytorch-optimizer"),
    "shampoo": Method("Shampoo", shampoo, SHAMPOO_GRIDS, package="pytorch-optimizer"),
    "msvag": Method("M-SVAG", msvag, MSVAG_GRIDS, own=True),
    "kfac": Method("K-FAC", with_sgd(), KFAC_GRIDS, own=True),
    "kfac_eigen": Method("K-FAC, eigen", with_sgd(solver="eigen"), EIGEN_GRIDS, own=True),
    "ekfac": Method("EKFAC", with_sgd(solver="ekfac"), EIGEN_GRIDS, own=True),
    "kfac_block": Method("Block K-FAC", block_kfac, KFAC_GRIDS, own=True),
    "cg": Method("K-FAC CG", cg, CG_GRIDS, own=True),
    "newton": Method("K-FAC Newton", newton(), NEWTON_GRIDS, own=True),
    "newton_chain": Method(
        "K-FAC Newton, tridiagonal", newton(structure="block_tridiagonal", solver="eigen"), NEWTON_GRIDS, own=True
    ),
}
