"""The errors of published runs by what they have in common: fitted data, read once (`errors.yaml`)."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import hypot, sqrt
from statistics import fmean
from typing import Any, Literal, get_args

import msgspec
import numpy as np
from msgspec.structs import astuple, replace
from numpy.typing import NDArray
from scipy.linalg import cho_factor

from mopsim.common.errors import require, require_at_least
from mopsim.common.io import Spec, convert
from mopsim.common.shipped import shipped
from mopsim.intervals.made import ALWAYS, Made
from mopsim.spec.categories import STEP_PARTS

Array = NDArray[np.float64]
LEVELS = (
    "common", "stack", "hardware", "precision", "network", "source", "source_network", "reading",
    "source_reading",
)  # fmt: skip
"""What runs may have in common, each with a deviation of its own."""


WHOLE = "device"
"""A reading of the whole device: of what it holds beside the tensors too little is known for it to tell
anything of them."""


class Deviations(Spec, frozen=True, kw_only=True):
    """Standard deviations of ln(measured / predicted), by what the part of the error belongs to: all runs, a
    stack, a machine type, a precision, a network, a source, a network in a source, a kind of reading, that
    kind as a source reads it, a run. Those of readings are 0 where no run has one. unseen: what the error of
    a source's program has beside these until its runs are compared with predictions and its description is
    mended; unseen_share: of how many programs, the others being as described. widening: what all are
    multiplied by, so that a nominal 90 % held 90 % of the runs of sources that were left out, the sources
    weighing alike; ratio_widening: the same of the ratios of two runs of a source, on one network and
    machine type, those of one program and of two weighing alike."""

    common: float
    stack: float
    hardware: float
    precision: float
    network: float
    source: float
    source_network: float
    reading: float = 0.0
    source_reading: float = 0.0
    run: float
    unseen: float = 0.0
    unseen_share: float = 1.0
    widening: float = 1.0
    ratio_widening: float = 1.0

    def of(self, *levels: str) -> float:
        """Of the sum of these parts."""
        return hypot(*(getattr(self, level) for level in levels))

    def __post_init__(self) -> None:
        require_at_least(self, 0, *LEVELS, "run", "unseen", "unseen_share", "widening", "ratio_widening")
        require(self.unseen_share <= 1, "unseen_share", self.unseen_share, "must be at most 1")


class ErrorCell(Spec, frozen=True, kw_only=True):
    """Runs alike in all levels. mean: of their ln(measured / predicted); squares: sum of the squared
    departures from it. reading: how it was measured, where that is not the simulated quantity itself; one of
    the whole device (WHOLE) has only its readings in common with others. made: what the prediction is made
    of; empty of runs whose errors are in units of a usual run's (ErrorQuantity.scale)."""

    source: str
    stack: str
    hardware: str
    precision: str
    network: str
    reading: str = ""
    made: Made = ()
    runs: float
    mean: float
    squares: float = 0.0

    def level(self, name: str) -> str:
        """What equals that of another cell where the two have this level in common; empty where it has no
        part of this level. `program`: a stack as a source runs it, whatever was read of it."""
        if name == "program":
            return f"{self.source} {self.stack}"
        if self.reading == WHOLE and not name.endswith("reading"):
            return ""
        if name == "common":
            return name
        part = getattr(self, name.removeprefix("source_"))
        if name.endswith("reading") and not part:
            return ""
        owner = self.source if name.startswith("source_") else ""
        return f"{owner} {part}"


def cells(runs: Iterable[ErrorCell]) -> tuple[ErrorCell, ...]:
    """Runs (cells of one each) that are alike in all levels, as one cell."""
    groups: dict[ErrorCell, list[float]] = defaultdict(list)
    for run in runs:
        groups[replace(run, runs=1, mean=0.0, squares=0.0)].append(run.mean)
    found = []
    for key, errors in sorted(groups.items(), key=lambda item: astuple(item[0])):
        mean = fmean(errors)
        squares = sum((error - mean) ** 2 for error in errors)
        found.append(replace(key, runs=len(errors), mean=round(mean, 5), squares=round(squares, 6)))
    return tuple(found)


class ErrorQuantity(Spec, frozen=True, kw_only=True, dict=True):
    """What is known of one quantity's error. parts: how far off each part of what a prediction is made of is,
    and what every prediction has (ALWAYS), over a usual run's error; none where it does not matter. The cells
    are in units of a usual run's. without: the deviations as fitted without a source, by its name."""

    deviations: Deviations
    parts: dict[str, float] = msgspec.field(default_factory=dict)
    cells: tuple[ErrorCell, ...]
    without: dict[str, Deviations] = msgspec.field(default_factory=dict)

    @cached_property
    def sources(self) -> frozenset[str]:
        """Whose programs have been mended by their runs."""
        return frozenset(one.source for one in self.cells)

    @cached_property
    def as_described(self) -> "ErrorQuantity":
        """As if all programs were."""
        return replace(self, deviations=replace(self.deviations, unseen=0.0))

    @cached_property
    def told(self) -> "KnownCells":
        """What its cells tell by themselves."""
        return known_cells(self)

    @cached_property
    def _left_out(self) -> dict[str, "ErrorQuantity"]:
        """The last one of `leaving_out`: runs are scored source by source."""
        return {}

    def leaving_out(self, source: str) -> "ErrorQuantity":
        """As if this source had never been seen."""
        if source not in self._left_out:
            self._left_out.clear()
            kept = tuple(cell for cell in self.cells if cell.source != source)
            sd = self.without.get(source, self.deviations)
            self._left_out[source] = ErrorQuantity(deviations=sd, parts=self.parts, cells=kept)
        return self._left_out[source]

    def scale(self, made: Made) -> float:
        """By how much the error of a prediction that is made of this exceeds a usual one's: parts err each on
        its own, so that it is the root of the sum of the squares of shares by parts' errors."""
        if not self.parts or not made:
            return 1.0
        known = zip(STEP_PARTS, made, strict=True)
        return sqrt(self.parts[ALWAYS] ** 2 + sum((self.parts[part] * share) ** 2 for part, share in known))

    def usual(self, run: ErrorCell) -> ErrorCell:
        """A run, its error in units of a usual run's."""
        by = self.scale(run.made)
        return replace(run, mean=run.mean / by, squares=run.squares / by**2, made=())


@dataclass(frozen=True)
class KnownCells:
    """Cells, the variance of a run's own part by source, and the factor of the covariance of their means."""

    cells: tuple[ErrorCell, ...]
    runs: dict[str, float]
    factor: tuple[Any, Any]


def known_cells(quantity: ErrorQuantity, seen: tuple[ErrorCell, ...] = ()) -> KnownCells:
    """Those of a quantity and those seen beside them."""
    cells, sd = (*quantity.cells, *seen), quantity.deviations
    runs = run_variances(cells, sd)
    own = np.diag([runs[one.source] / one.runs for one in cells])
    factor = cho_factor(covariance(cells, cells, quantity) + own) if cells else (own, True)
    return KnownCells(cells, runs, factor)


def covariance(some: Sequence[ErrorCell], others: Sequence[ErrorCell], quantity: ErrorQuantity) -> Array:
    """Of the means of two lists of cells, without what each run has alone."""
    found, sd = np.zeros((len(some), len(others))), quantity.deviations
    for level in LEVELS:
        found += getattr(sd, level) ** 2 * alike(level, some, others)
    if sd.unseen:
        new = np.array([one.source not in quantity.sources for one in some])
        found += sd.unseen**2 * (alike("program", some, others) & new[:, None])
    return found


def alike(level: str, some: Sequence[ErrorCell], others: Sequence[ErrorCell]) -> NDArray[np.bool_]:
    """Which cells of two lists have a level in common."""
    numbers: dict[str, int] = {"": 0}
    left, right = (
        np.array([numbers.setdefault(cell.level(level), len(numbers)) for cell in cells], dtype=int)
        for cells in (some, others)
    )
    same: NDArray[np.bool_] = (left[:, None] == right[None, :]) & (left != 0)[:, None]
    return same


SHRINK = 8
"""Degrees of freedom that the deviation of all runs counts for beside the runs of a source: a source's own
scatter decides where it has more."""


def run_variances(cells: Sequence[ErrorCell], sd: Deviations) -> dict[str, float]:
    """Variance of a run's own part, by source: the scatter within its cells, drawn to that of all runs (the
    mean of the scaled inverse chi-square)."""
    found: dict[str, float] = {}
    for source in {cell.source for cell in cells}:
        mine = [cell for cell in cells if cell.source == source]
        free, squares = sum(max(cell.runs - 1, 0) for cell in mine), sum(cell.squares for cell in mine)
        found[source] = (SHRINK * sd.run**2 + squares) / (SHRINK + free)
    return found


Name = Literal["step_time", "peak_memory"]
NAMES: tuple[Name, ...] = get_args(Name)


class Guesses(Spec, frozen=True, kw_only=True):
    """The errors of the same runs, predicted by stacks that are none of their programs' but stand for what
    nobody described. The level `stack` is the program's own."""

    stacks: tuple[str, ...]
    step_time: ErrorQuantity
    peak_memory: ErrorQuantity


class Errors(Spec, frozen=True, kw_only=True):
    """The data of `errors.yaml`. made_by: the command that fits it; exact: standard deviation of ln(measured
    / predicted) of the peak of a program that allocates to the byte what is simulated, exact_source: whence;
    exact_on: platforms of devices (`HardwareProfile.device_kind`) on which peaks of its runs were compared.
    """

    made_by: str
    exact: float
    exact_source: str
    exact_on: tuple[str, ...]
    step_time: ErrorQuantity
    peak_memory: ErrorQuantity
    guesses: Guesses

    def of(self, name: Name, stack: str) -> ErrorQuantity:
        """What is known of the errors of a prediction by this stack."""
        known: ErrorQuantity = getattr(self.guesses if stack in self.guesses.stacks else self, name)
        return known


@cache
def known_errors() -> Errors:
    """What is installed."""
    return convert(
        shipped("mopsim.intervals", "errors.yaml"), Errors, "errors", "mopsim/intervals/errors.yaml"
    )
