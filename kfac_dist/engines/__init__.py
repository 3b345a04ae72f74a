"""Engines: where a parameter's gradient lives. They know ranks and shards, but nothing of K-FAC."""

from kfac_dist.engines.base import Engine
from kfac_dist.engines.build import as_engine, build_engine, check_engine, check_sections
from kfac_dist.engines.training_engine import TrainingEngine

__all__ = ["Engine", "TrainingEngine", "as_engine", "build_engine", "check_engine", "check_sections"]
