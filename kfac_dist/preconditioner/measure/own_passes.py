"""K-FAC's own passes from the model's outputs (`mc`, `type2`): the vectors that are sent back, and their classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from kfac_dist.config.schema import CurvatureConfig, Fisher
from kfac_dist.curvature.class_conditional import Classes
from kfac_dist.curvature.factors import Side
from kfac_dist.curvature.fisher import drawn_classes, hessian_columns, label_gradient
from kfac_dist.curvature.statistics import RunningAverages
from kfac_dist.errors import ModelError


class OwnPasses:
    """The vectors that a Fisher sends back from the outputs, shaped like these.

    Args:
        config: The Fisher, its likelihood, its seed, and the classes that statistics are kept apart by.
    """

    def __init__(self, config: CurvatureConfig) -> None:
        self._config = config

    def columns(self, outputs: Tensor, step: int, first_sample: int) -> Iterable[Tensor]:
        """Return the columns of the Hessian's square root (`type2`), or one gradient at drawn labels (`mc`).

        Args:
            outputs: The model's, of a micro-batch.
            step: The optimizer step, which the draw depends on.
            first_sample: Number of the micro-batch's first sample in the global batch, likewise.
        """
        config = self._config
        assert config.likelihood is not None  # the schema refuses these Fishers without one
        if config.fisher is Fisher.TYPE2:
            return hessian_columns(config.likelihood, outputs)
        return [self.drawn_labels(outputs, step, first_sample)]

    def drawn_labels(self, outputs: Tensor, step: int, first_sample: int) -> Tensor:
        """Return the gradient of the terms' negative log-likelihoods at labels drawn from the model."""
        config = self._config
        assert config.likelihood is not None
        return label_gradient(config.likelihood, outputs, seed=config.seed, step=step, first_sample=first_sample)

    def classes(self, outputs: Tensor, step: int, first_sample: int) -> Iterator[Classes]:
        """Yield the classes of the terms behind each of `columns`: drawn ones, or a column's own.

        Nothing where statistics aren't kept apart by class.

        Raises:
            ModelError: The model has another number of outputs than there are classes.
        """
        config = self._config
        if not config.class_slots:
            return
        assert config.class_conditional is not None
        assert config.class_conditional.classes is not None
        number, slots = config.class_conditional.classes, config.class_slots
        if outputs.shape[-1] != number:
            raise ModelError(
                f"kfac.curvature.class_conditional.classes is {number}, but the model has {outputs.shape[-1]} outputs "
                f"a term, and fisher {config.fisher} knows as many classes: set it to {outputs.shape[-1]}"
            )
        probability = outputs.detach().float().softmax(-1)
        if config.fisher is Fisher.MC:
            sampled = drawn_classes(probability, seed=config.seed, step=step, first_sample=first_sample)
            yield Classes.of(sampled, number, slots)
            return
        for index in range(number):
            yield Classes(slots, index=index, shares=probability[..., index])


class ClassesOnly:
    """A sink that counts terms by class alone, for the further columns of one micro-batch."""

    def __init__(self, averages: RunningAverages) -> None:
        self._averages = averages
        self.add_rows = averages.add_rows
        self.add_values = averages.add_values

    def add_count(self, block: str, side: Side, count: float | Tensor, by_class: Tensor | None = None) -> None:
        """Take the counts by class."""
        self._averages.add_count(block, side, 0.0, by_class)


class SumsOnly:
    """A sink that takes sums but no counts, for the further columns of one micro-batch."""

    def __init__(self, averages: RunningAverages) -> None:
        self.add_rows = averages.add_rows
        self.add_values = averages.add_values

    def add_count(self, block: str, side: Side, count: float | Tensor, by_class: Tensor | None = None) -> None:
        """Take no count: the first column brought it."""
