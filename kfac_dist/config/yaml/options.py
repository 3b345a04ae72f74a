"""The options of a `KFAC` that is built by hand: a mapping, checked as strictly as a file is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from kfac_dist.config.schema import Fisher, KFACConfig, Likelihood, Section
from kfac_dist.config.yaml.document import Document, Origin
from kfac_dist.config.yaml.explain import config_error
from kfac_dist.errors import ConfigError


class _KFACOnly(Section):
    """The kfac section by itself, so that mistakes in it carry the paths that a run's configuration has."""

    kfac: KFACConfig


def parse_kfac(options: KFACConfig | Mapping[str, Any] | None) -> KFACConfig:
    """Check the options of a `KFAC` that is built by hand.

    Raises:
        ConfigError: One line for each mistake, or a Fisher that needs a likelihood without one.
    """
    if isinstance(options, KFACConfig):
        config = options
    else:
        values = {"kfac": dict(options or {})}
        try:
            config = _KFACOnly.model_validate(values).kfac
        except ValidationError as error:
            raise config_error(error, Document(values, {(): Origin("KFAC(config)")})) from None
    if config.curvature.fisher in (Fisher.MC, Fisher.TYPE2) and config.curvature.likelihood is None:
        raise ConfigError(
            f"kfac.curvature.fisher: {config.curvature.fisher} draws on the model's predictive distribution: set "
            "kfac.curvature.likelihood to categorical, bernoulli or gaussian, as the loss is"
        )
    _check_classes(config)
    return config


def _check_classes(config: KFACConfig) -> None:
    curvature = config.curvature
    if curvature.class_conditional is None:
        return
    if curvature.class_conditional.classes is None:
        raise ConfigError(
            "kfac.curvature.class_conditional.classes: missing; a KFAC that is built by hand doesn't see how many "
            "outputs the model has: give the number of classes, {classes: 10}"
        )
    if curvature.fisher is not Fisher.EMPIRICAL and curvature.likelihood is not Likelihood.CATEGORICAL:
        raise ConfigError(
            f"kfac.curvature.class_conditional: the labels of fisher {curvature.fisher} are classes only if "
            f"kfac.curvature.likelihood is categorical, and it is {curvature.likelihood}: use fisher empirical and "
            "kfac.micro_batch(classes=labels)"
        )
