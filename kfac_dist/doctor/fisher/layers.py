"""The diagonal Fisher of each layer and both estimators' variances, at the weights that a model has now."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from kfac_dist.config.schema import Likelihood
from kfac_dist.curvature.fisher import label_gradient
from kfac_dist.doctor.fisher.diagonal_fisher import estimates, moments
from kfac_dist.doctor.fisher.directional import Derivatives, OutputFunction, curvedness, mismatch
from kfac_dist.doctor.fisher.smoothness import Course, Operation

# Of a larger parameter, so many values are looked at, drawn at random.
COORDINATES = 128
# Labels drawn for each sample, to set an estimate of the variance beside its closed form.
DRAWS = 16
# Numbers computed for one measurement of all layers, and held at a time.
WORK = 2**32
HELD = 2**25
MOST_AT_ONCE = 256
# A share of the first derivative's change that the second one misses: more than quadrature and rounding leave.
KINK = 0.02
# Relative rounding error of an affine function.
AFFINE = 1e-4


@dataclass(frozen=True)
class Layer:
    """A module's own trained parameters.

    Attributes:
        name: The module's, or of a parameter of the model itself the parameter's.
        parameters: Their names.
        role: `last`, `penultimate` or empty.
        refused: Why Î2 is refused; empty if it isn't.
        structural: Whether the outputs are affine in them.
        curvedness: Their distance from that.
    """

    name: str
    parameters: tuple[str, ...]
    role: str = ""
    refused: str = ""
    structural: bool = False
    curvedness: float = 0.0


@dataclass(frozen=True)
class Sums:
    """Sums over a layer's parameters, of one sample.

    Attributes:
        trace: Σ I_ii.
        squares: Σ I_ii².
        first: Σ N·Var[Î1_ii | x], the mean over x.
        second: Σ N·Var[Î2_ii | x].
        first_drawn: The first by drawn labels.
        second_drawn: The second by drawn labels.
        data: Σ Var_x[I_ii(x)].
        empirical: Trace of the empirical Fisher.
        bend: Largest |∂²_iih|.
    """

    trace: float
    squares: float
    first: float
    second: float
    first_drawn: float
    second_drawn: float
    data: float
    empirical: float
    bend: float

    def deviation(self, variance: float) -> float:
        """Return the relative standard deviation of one sample with one label."""
        return math.sqrt(variance / self.squares) if self.squares > 0 else 0.0


def find_layers(module: nn.Module, course: Course) -> list[Layer]:
    """Return the layers that the outputs depend on, in the order of execution, the last two named."""
    members: dict[str, list[str]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and name in course.last_use:
            members.setdefault(name.rpartition(".")[0] or name, []).append(name)
    names = sorted(members, key=lambda layer: max(course.last_use[name] for name in members[layer]))
    roles = dict(zip(names[::-1], ("last", "penultimate"), strict=False))
    return [Layer(name, tuple(members[name]), roles.get(name, "")) for name in names]


def judge_smoothness(outputs: OutputFunction, layers: Sequence[Layer], course: Course) -> list[Layer]:
    """Return the layers with the objections to Î2, and where it has no variance.

    Raises:
        RuntimeError: Torch can't differentiate the model twice.
    """
    curved = {layer.name: curvedness(outputs, layer.parameters) for layer in layers}
    affine = {name for name, value in curved.items() if value <= AFFINE}
    kinks = {layer.name: course.kinks_of(list(layer.parameters)) for layer in layers}
    unsuspected = [layer for layer in layers if not kinks[layer.name] and layer.name not in affine]
    moved = [name for layer in unsuspected for name in layer.parameters]
    missed = mismatch(outputs, moved) if moved else 0.0
    judged = []
    for layer in layers:
        refused = ""
        if kinks[layer.name]:
            refused = _kinked(kinks[layer.name])
        elif layer in unsuspected and missed > KINK:
            doubts = course.doubts_of(list(layer.parameters))
            refused = (
                f"the first derivative jumps: its change along a segment of weights is {missed:.0%} off what the "
                "second says" + (f"; perhaps by {doubts[0]}" if doubts else ", by which operation can't be told")
            )
        structural = layer.name in affine and not refused
        judged.append(Layer(layer.name, layer.parameters, layer.role, refused, structural, curved[layer.name]))
    return judged


def _kinked(kinks: Sequence[Operation]) -> str:
    where = list(dict.fromkeys(map(str, kinks)))
    more = f" and {len(where) - 1} more" if len(where) > 1 else ""
    return f"{where[-1]}{more}: not twice differentiable, so the zero or small variance that it shows says nothing"


def coordinates_of(parameters: Mapping[str, Tensor], elements: int) -> dict[str, Tensor]:
    """Return by parameter the indices to look at: all, or as many as `COORDINATES` and `WORK` allow.

    Args:
        parameters: The trained parameters.
        elements: Numbers that one forward pass computes.
    """
    count = max(4, min(COORDINATES, WORK // max(1, 8 * elements * len(parameters))))
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.arange(p.numel()) if p.numel() <= count else torch.randperm(p.numel(), generator=generator)[:count]
        for name, p in parameters.items()
    }


def measure_layers(
    outputs: OutputFunction,
    layers: Sequence[Layer],
    indices: Mapping[str, Tensor],
    likelihood: Likelihood,
    data_gradient: Tensor,
    *,
    elements: int,
    seed: int,
) -> dict[str, Sums]:
    """Return the sums of every layer.

    Args:
        outputs: The model on some samples.
        layers: The layers.
        indices: The examined coordinates of every parameter.
        likelihood: Predictive distribution.
        data_gradient: Gradient of the summed loss at the outputs, with the data's labels.
        elements: Numbers that one forward pass computes.
        seed: Of the labels.

    Raises:
        RuntimeError: Torch can't differentiate the model twice.
    """
    chunk = max(1, min(MOST_AT_ONCE, HELD // max(1, 4 * elements)))
    found = {}
    for layer in layers:
        sums = dict.fromkeys((field.name for field in fields(Sums)), 0.0)
        for name in layer.parameters:
            # Of a sample of coordinates, each stands for several.
            share = outputs.parameters[name].numel() / len(indices[name])
            for part in outputs.derivatives(name, indices[name].to(data_gradient.device), chunk=chunk):
                _add(sums, share, part, likelihood, data_gradient, seed)
        found[layer.name] = Sums(**sums)
    return found


def _add(
    sums: dict[str, float], share: float, part: Derivatives, likelihood: Likelihood, data_gradient: Tensor, seed: int
) -> None:
    exact = moments(likelihood, part)
    fisher = exact.fisher.mean(1)
    drawn = [
        estimates(likelihood, part, label_gradient(likelihood, part.outputs, seed=seed, step=draw, first_sample=0))
        for draw in range(DRAWS)
    ]
    first, second = (torch.stack(values) for values in zip(*drawn, strict=True))
    score = (data_gradient * part.slopes).reshape(*part.slopes.shape[:2], -1).sum(-1).double()
    spread = exact.fisher.var(1).sum() if exact.fisher.shape[1] > 1 else 0.0
    for name, value in (
        ("trace", fisher.sum()),
        ("squares", fisher.square().sum()),
        ("first", exact.first.mean(1).sum()),
        ("second", exact.second.mean(1).sum()),
        ("first_drawn", first.var(0).mean(1).sum()),
        ("second_drawn", second.var(0).mean(1).sum()),
        ("data", spread),
        ("empirical", score.square().mean(1).sum()),
    ):
        sums[name] += share * float(value)
    sums["bend"] = max(sums["bend"], float(part.bends.abs().max()))
