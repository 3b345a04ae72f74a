"""The costs of work and messages on a machine: a shipped profile, or a measurement of `kfac-dist calibrate`.

    profiles/*.yaml    datasheet figures times an assumed efficiency; each says where its figures are from
    measured.json      of the machine at hand, on the ranks that measured

Both have the same keys. A curve is points `size: value`, between which the planner interpolates and beyond which it
extrapolates, both in logarithms. In a profile it may be `{peak: …, fraction: {size: share}}`, for seconds of an
inversion with `cubes`: multiples of n³ flops.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Mapping
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError

from kfac_dist.config.schema import DType
from kfac_dist.config.section import Count, NonNegative, Positive, Section
from kfac_dist.config.yaml.document import parse
from kfac_dist.config.yaml.text import read_text
from kfac_dist.distributed.communicators.recording import Collective
from kfac_dist.errors import ConfigError, did_you_mean

_PROFILES = files("kfac_dist.planning.machines").joinpath("profiles")

# Sizes besides powers of two from which a curve is drawn without them.
_ENOUGH = 4


class _Peak(Section):
    """A datasheet's figure, and the share of it that is reached at some sizes; with `cubes` seconds of cubes·n³."""

    peak: Positive
    fraction: dict[Annotated[float, Field(gt=0)], Positive] = Field(min_length=1)
    cubes: Positive | None = None

    @property
    def points(self) -> dict[float, float]:
        rates = {size: self.peak * share for size, share in self.fraction.items()}
        return rates if self.cubes is None else {n: self.cubes * n**3 / rate for n, rate in rates.items()}


def _points(value: Any) -> Any:
    if isinstance(value, Mapping) and "peak" in value:
        return _Peak.model_validate(value).points
    return value


Points = Annotated[dict[Annotated[float, Field(gt=0)], Positive], Field(min_length=1), BeforeValidator(_points)]


class Curve:
    """Positive values over positive sizes, straight lines in logarithms.

    LAPACK takes up to twice as long at powers of two, whose rows meet in few places of a cache, as at their neighbours:
    where enough other sizes are known, powers of two speak for themselves alone.

    Args:
        points: Size to value.
    """

    def __init__(self, points: Mapping[float, float]) -> None:
        self._exact = dict(points)
        others = {size: value for size, value in points.items() if math.frexp(size)[0] != 0.5}
        ordered = sorted((others if len(others) >= _ENOUGH else points).items())
        self._sizes = [math.log(size) for size, _ in ordered]
        self._values = [math.log(value) for _, value in ordered]

    def at(self, size: float) -> float:
        """Return the value at a size; beyond the points, that of the last two points' line."""
        if size in self._exact:
            return self._exact[size]
        if len(self._sizes) == 1:
            return math.exp(self._values[0])
        place = math.log(max(size, 1e-9))
        right = min(max(bisect.bisect_left(self._sizes, place), 1), len(self._sizes) - 1)
        left = right - 1
        slope = (self._values[right] - self._values[left]) / (self._sizes[right] - self._sizes[left])
        return math.exp(self._values[left] + slope * (place - self._sizes[left]))

    def within(self, size: float) -> float:
        """Return the value at a size; beyond the points, that of the nearest one: for rates, which don't grow on."""
        return self.at(math.exp(min(max(math.log(max(size, 1e-9)), self._sizes[0]), self._sizes[-1])))


class Link(Section):
    """One way between two ranks.

    Attributes:
        latency: Seconds of the smallest message.
        bandwidth: Bytes a second that a rank sends, in one direction.
    """

    latency: NonNegative
    bandwidth: Positive


class Overhead(Section):
    """Seconds of a step independent of sizes: kernel launches, Python.

    Attributes:
        step: Of a step.
        block: Of each block in it.
    """

    step: NonNegative = 0.0
    block: NonNegative = 0.0


class Hardware(Section):
    """The costs of one rank of a machine.

    Attributes:
        format: Version of these keys.
        name: Its name.
        kind: `datasheet` figures times an efficiency, or `measured`.
        device: Device that computes.
        notes: Sources of the figures, and assumptions.
        ranks: Ranks that measured together; null for a datasheet.
        node_size: Ranks of a node.
        memory_bytes: Memory of a rank's device; null where it isn't known.
        matmul: Flops a second of a product, by the size of the cube with as many flops (2n³), for each precision.
        gram: Flops a second of `XᵀX`, an n×n matrix from m rows counted as mn² flops, by the cube root of mn².
        cholesky: Seconds of one damped inverse by Cholesky, by n.
        cholesky_more: Seconds that each further matrix of the same batch adds, by n.
        eigen: Seconds of one eigendecomposition, by n.
        eigen_more: Seconds that each further matrix of the same batch adds, by n.
        memory: Bytes per second, read and written together, by the bytes of the copied tensor.
        crowding: Slowdown of a rank by the number of computing ranks of its node; 1 if unknown.
        preconditioning: Fixed costs of every step.
        measuring: Fixed costs that a step that measures adds.
        refreshing: Fixed costs that a step that refreshes adds.
        intra: The way between two ranks of a node; null where one rank measured alone, which knows no network.
        inter: The way between two nodes, for each rank; null: only one node is known, and the way in it counts.
        collectives: Seconds by kind, number of ranks and bytes (`Call.nbytes`), where they were measured.
    """

    format: Literal[1] = 1
    name: str
    kind: Literal["datasheet", "measured"]
    device: str
    notes: tuple[str, ...] = ()
    ranks: Count | None = None
    node_size: Count
    memory_bytes: Positive | None = None
    matmul: dict[DType, Points] = Field(min_length=1)
    gram: Points
    cholesky: Points
    cholesky_more: Points
    eigen: Points
    eigen_more: Points
    memory: Points
    crowding: dict[Annotated[int, Field(ge=1)], Positive] = Field(default_factory=dict)
    preconditioning: Overhead
    measuring: Overhead
    refreshing: Overhead
    intra: Link | None = None
    inter: Link | None = None
    collectives: dict[Collective, dict[Annotated[int, Field(ge=2)], Points]] = Field(default_factory=dict)

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """Every curve by its key; products by `matmul.` and the precision."""
        names = ("gram", "cholesky", "cholesky_more", "eigen", "eigen_more", "memory")
        found = {name: Curve(getattr(self, name)) for name in names}
        return found | {f"matmul.{dtype}": Curve(points) for dtype, points in self.matmul.items()}

    @cached_property
    def measured_collectives(self) -> dict[tuple[Collective, int], Curve]:
        """Curves of seconds over bytes, by kind and number of ranks."""
        return {
            (kind, size): Curve(points) for kind, sizes in self.collectives.items() for size, points in sizes.items()
        }

    @cached_property
    def _crowding(self) -> Curve:
        return Curve({1.0: 1.0} | {float(count): value for count, value in self.crowding.items()})

    def slower(self, active: int) -> float:
        """Return how many times slower a rank computes while `active` ranks of its node do."""
        return max(1.0, self._crowding.at(active))

    def product_seconds(self, m: int, n: int, k: int, dtype: DType, batch: int = 1) -> float:
        """Return the seconds of `batch` products of m×k with k×n matrices."""
        known = f"matmul.{dtype}" if dtype in self.matmul else f"matmul.{DType.FLOAT32}"
        cube = (float(m) * n * k) ** (1 / 3)
        return 2.0 * m * n * k * batch / self.curves[known].within(cube)

    def gram_seconds(self, rows: float, n: int, batch: int = 1) -> float:
        """Return the seconds of `batch` second moments of so many rows of n columns."""
        if rows <= 0:
            return 0.0
        return rows * n * n * batch / self.curves["gram"].within((rows * n * n) ** (1 / 3))

    def copy_seconds(self, nbytes: float) -> float:
        """Return the seconds in which so many bytes are read and written together."""
        return nbytes / self.curves["memory"].within(nbytes) if nbytes > 0 else 0.0

    def solve_seconds(self, n: int, batch: int, *, eigen: bool) -> float:
        """Return the seconds of `batch` inverses, or eigendecompositions, of size n that are solved together."""
        name = "eigen" if eigen else "cholesky"
        return self.curves[name].at(n) + (batch - 1) * self.curves[f"{name}_more"].at(n)


def load_hardware(name: str) -> Hardware:
    """Return a shipped profile by its name, or the one of a file.

    Raises:
        ConfigError: There is neither; or the file is torn, isn't a mapping, or has keys or values that no machine has.
    """
    if name in profiles():
        return _parse(yaml.safe_load(_PROFILES.joinpath(f"{name}.yaml").read_text()), name)
    path = Path(name)
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ConfigError(
            f"--hardware: found {name!r}{did_you_mean(name, profiles())}; expected one of {', '.join(profiles())}, or "
            "a file that `kfac-dist calibrate --out measured.json` has written"
        )
    try:
        text = read_text(path)
        values = json.loads(text) if path.suffix == ".json" else parse(text, name).values
    except FileNotFoundError:
        raise ConfigError(f"--hardware: {name} can't be read: no such file") from None
    except ConfigError as error:
        raise ConfigError(f"--hardware: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"--hardware: {name} is cut off, or no json at all ({' '.join(str(error).split())}): measure "
            "again with `kfac-dist calibrate --out FILE`"
        ) from error
    return _parse(values, name)


def profiles() -> list[str]:
    """Return the names of the shipped profiles."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _PROFILES.iterdir() if entry.name.endswith(".yaml"))


def _parse(values: Any, name: str) -> Hardware:
    if not isinstance(values, dict):
        raise ConfigError(f"--hardware: {name} holds {type(values).__name__}, expected a mapping of costs")
    try:
        return Hardware.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_line(name, found) for found in error.errors())) from None


def _line(name: str, found: Any) -> str:
    key = ".".join(str(part) for part in found["loc"] if part != "[key]")
    shown = "" if found["type"] == "missing" else f" (found {str(found['input'])[:60]!r})"
    return f"--hardware: {name}: {key}: {found['msg'][:1].lower()}{found['msg'][1:]}{shown}"
