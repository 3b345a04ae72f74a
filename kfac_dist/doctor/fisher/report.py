"""The doctor's report on the estimators of the diagonal Fisher."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kfac_dist.doctor.fisher.layers import Layer, Sums


@dataclass(frozen=True)
class FisherRow:
    """Both estimators in one layer, at the initial weights.

    Deviations are relative and of one sample with one label, `√(Σ_i N·Var_i / Σ_i I_ii²)`: of N samples, divide by √N.

    Attributes:
        layer: Its name; of a parameter that the model itself holds, the parameter's.
        role: `last` or `penultimate` in the order of execution, or empty.
        values: Trained values.
        coordinates: Those that were looked at: all, or some drawn at random from each parameter.
        trace: Σ_i I_ii, of one sample.
        first: Deviation of Î1 by its closed form.
        first_drawn: The same from drawn labels.
        second: Deviation of Î2 by its closed form; None where it is refused.
        second_drawn: The same from drawn labels.
        data: Deviation of I_ii itself from sample to sample, which both estimators have besides their own.
        empirical: Trace of the empirical Fisher, with the data's labels, over `trace`.
        structural: Whether the outputs are affine in the layer's parameters, so that Î2 has no variance at all.
        curvedness: Their distance from affine, `directional.curvedness`.
        bend: The largest |∂²_iih| that was found.
        refused: Why Î2 is refused; empty if it isn't.
        labels_first: Labels for the asked deviation by Î1.
        labels_second: Labels for it by Î2; 0 where none is needed, None where it is refused.
    """

    layer: str
    role: str
    values: int
    coordinates: int
    trace: float
    first: float
    first_drawn: float
    second: float | None
    second_drawn: float | None
    data: float
    empirical: float
    structural: bool
    curvedness: float
    bend: float
    refused: str
    labels_first: int
    labels_second: int | None

    @property
    def better(self) -> str:
        """The estimator with less variance; neither where the Fisher is zero at all that was looked at."""
        if not self.trace:
            return "–"
        return "Î2" if self.second is not None and self.second <= self.first else "Î1"


@dataclass(frozen=True)
class TrendRow:
    """One layer after some steps.

    Attributes:
        step: Steps taken.
        layer: Its name.
        trace: Σ_i I_ii, of one sample.
        first: Σ_i N·Var[Î1_ii].
        second: Σ_i N·Var[Î2_ii]; None where it is refused.
        first_deviation: As `FisherRow.first`.
        second_deviation: As `FisherRow.second`.
        empirical: As `FisherRow.empirical`.
    """

    step: int
    layer: str
    trace: float
    first: float
    second: float | None
    first_deviation: float
    second_deviation: float | None
    empirical: float


@dataclass(frozen=True)
class FisherCost:
    """Seconds on this machine.

    Attributes:
        step: One step of the run with everything that K-FAC does in it, the mean over those taken; None if none was.
        backward: One more backward pass of a step's batch, with drawn labels; the median of the slowest rank.
        coordinate: ∂_ih and ∂²_iih of one parameter's value, of as many samples as were looked at.
    """

    step: float | None
    backward: float
    coordinate: float


@dataclass(frozen=True)
class FisherReport:
    """The diagonal Fisher's estimators in a run.

    Attributes:
        likelihood: Distribution of the sampled labels.
        columns: Outputs of one term: the columns of `fisher: type2`.
        samples: Samples that were looked at.
        draws: Labels that were drawn for each of them.
        deviation: The relative standard deviation that labels are counted for.
        layers: In the order of execution.
        trend: The layers again, after some steps each.
        cost: Seconds of its parts.
        advice: Advice, in sentences.
    """

    likelihood: str
    columns: int
    samples: int
    draws: int
    deviation: float
    layers: tuple[FisherRow, ...]
    trend: tuple[TrendRow, ...]
    cost: FisherCost
    advice: tuple[str, ...]


def layer_row(layer: Layer, sums: Sums, values: int, coordinates: int, deviation: float) -> FisherRow:
    """Return the report of a layer at the initial weights.

    Args:
        layer: The layer.
        sums: The measurements.
        values: Trained values.
        coordinates: Those that were looked at.
        deviation: Relative standard deviation to count labels for.
    """
    first, second = sums.deviation(sums.first), sums.deviation(sums.second)
    allowed = not layer.refused
    return FisherRow(
        layer=layer.name,
        role=layer.role,
        values=values,
        coordinates=coordinates,
        trace=sums.trace,
        first=first,
        first_drawn=sums.deviation(sums.first_drawn),
        second=second if allowed else None,
        second_drawn=sums.deviation(sums.second_drawn) if allowed else None,
        data=sums.deviation(sums.data),
        empirical=_empirical(sums),
        structural=layer.structural,
        curvedness=layer.curvedness,
        bend=sums.bend,
        refused=layer.refused,
        labels_first=math.ceil((first / deviation) ** 2),
        labels_second=math.ceil((second / deviation) ** 2) if allowed else None,
    )


def trend_rows(step: int, layers: Sequence[Layer], sums: dict[str, Sums]) -> Iterator[TrendRow]:
    """Yield the report of every layer after some steps."""
    for layer in layers:
        its, allowed = sums[layer.name], not layer.refused
        yield TrendRow(
            step=step,
            layer=layer.name,
            trace=its.trace,
            first=its.first,
            second=its.second if allowed else None,
            first_deviation=its.deviation(its.first),
            second_deviation=its.deviation(its.second) if allowed else None,
            empirical=_empirical(its),
        )


def _empirical(sums: Sums) -> float:
    return sums.empirical / sums.trace if sums.trace > 0 else 0.0
