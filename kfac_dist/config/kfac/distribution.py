"""`kfac.distribution`: work of each rank, and communication."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import ClassVar, Self

from pydantic import model_validator

from kfac_dist.config.kfac.curvature import DType
from kfac_dist.config.section import Count, Flag, Fraction, Gone, OpenNames, Seconds, Section


class AssignmentStrategy(StrEnum):
    """Assignment of inversions to ranks."""

    ROUND_ROBIN = "round_robin"
    BALANCED = "balanced"


class Placement(StrEnum):
    """The ranks that hold inverses and precondition (COMM-OPT, MEM-OPT, and the grid between them)."""

    AUTO = "auto"
    REPLICATED = "replicated"
    OWNER = "owner"
    HYBRID = "hybrid"
    NODE = "node"


class Reduction(StrEnum):
    """Reduction of local statistics to global ones."""

    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"


class ReduceEvery(StrEnum):
    """When local statistics become global: the numbers are the same."""

    REFRESH = "refresh"
    STEP = "step"


class Backend(OpenNames):
    """Transport of K-FAC's own collectives: one of these, or a registered communicator.

    Gradients always travel as the engine sends them.
    """

    TORCH = "torch"
    MPI = "mpi"


class DistributionConfig(Section):
    """Distribution of K-FAC's work over the ranks, and of its traffic.

    Attributes:
        backend: Library that communicates factors and inverses: `torch` (gloo, NCCL), or `mpi` for CPU clusters with
            a network that only MPI uses well; the ranks are then started by mpirun. Or one that a module under
            `extensions` registers.
        assignment: Rule that gives each unit its owner: round-robin, or so that the ranks' sums of n³ are `balanced`.
        placement: Ranks that hold inverses and precondition; `auto` is `replicated` under DDP, `owner` when sharded.
        grad_worker_fraction: `hybrid` only: share of the ranks that precondition one block; times W it is a whole
            number that divides W.
        reduction: `all_reduce` gives every rank every factor, `reduce_scatter` only the factors that it inverts.
        reduce_every: `refresh` reduces when an inverse needs it, `step` at every measurement.
        communication_dtype: Precision of factors when sent; `auto` is float64 if they are kept in it, else float32.
        pack_triangles: Send only one triangle of symmetric matrices: half the bytes at the cost of two copies; for slow
            links.
        buckets: Number of collectives that one reduction is divided into, so that it overlaps with backward.
        overlap: Start reducing during the step's last backward, announced by `kfac.micro_batch(last=True)`; otherwise
            reduce in `step()`.
        timeout_seconds: Seconds that a collective of K-FAC may wait before it fails on every rank.
    """

    questions: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Which rank inverts?": ("assignment",),
        "Which ranks hold inverses and precondition?": ("placement", "grad_worker_fraction"),
        "How do statistics become global, and when?": ("reduction", "reduce_every", "buckets", "overlap"),
        "How is data sent?": ("backend", "communication_dtype", "pack_triangles", "timeout_seconds"),
    }

    gone: ClassVar[Mapping[str, Gone]] = {
        "cost_model": Gone("cubic", "leave it out; assignment: balanced goes by n³"),
    }

    backend: Backend = Backend.TORCH
    assignment: AssignmentStrategy = AssignmentStrategy.ROUND_ROBIN
    placement: Placement = Placement.AUTO
    grad_worker_fraction: Fraction | None = None
    reduction: Reduction = Reduction.ALL_REDUCE
    reduce_every: ReduceEvery = ReduceEvery.REFRESH
    communication_dtype: DType = DType.AUTO
    pack_triangles: Flag = False
    buckets: Count = 4
    overlap: Flag = True
    timeout_seconds: Seconds = 600.0

    @model_validator(mode="after")
    def _fraction_belongs_to_hybrid(self) -> Self:
        hybrid = self.placement is Placement.HYBRID
        if hybrid and self.grad_worker_fraction is None:
            raise ValueError(
                "placement hybrid needs grad_worker_fraction, the share of ranks that precondition a block"
            )
        if not hybrid and self.grad_worker_fraction is not None:
            raise ValueError(f"grad_worker_fraction needs placement hybrid; with {self.placement} leave it out")
        return self
