"""The hierarchical model of errors, fitted to published runs (mopsim.intervals: what it is, and its result).

Deviations are those of the highest penalized likelihood of the cells' means and of the scatter within them:
each is drawn off zero by a gamma prior of shape 2 (Chung et al. 2013, Psychometrika 78), which matters where
few groups tell little. Then all are widened or narrowed together, until a nominal 90 % of the runs of sources
that are left out is held, the sources weighing alike; and once more for the ratios of two of their runs. A
source that is left out takes no part in either.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations_with_replacement, repeat
from math import log

import msgspec
import numpy as np
from scipy.optimize import minimize
from scipy.special import ndtri

from mopsim.common.processes import pool, workers
from mopsim.intervals.errors import LEVELS, Deviations, ErrorCell, ErrorQuantity, cells
from mopsim.intervals.spread import Array, alike, between, spread

NOMINAL = 0.9
"""The level whose coverage sets the widening."""
SMALLEST, LARGEST = 1e-3, 1.0
"""A deviation's bounds: a thousandth, and a factor e."""


def fit_errors(runs: Sequence[ErrorCell]) -> ErrorQuantity:
    """The model of one quantity, from runs (cells of one each), and its deviations without each source."""
    known = _Sources(runs)
    known.fit()
    without = {source: _widened(known, known.all - {source}) for source in sorted(known.all)}
    return ErrorQuantity(deviations=_widened(known, known.all), cells=cells(runs), without=without)


class _Sources:
    """Runs by source, and what some of the sources tell, fitted once."""

    def __init__(self, runs: Sequence[ErrorCell]) -> None:
        self.runs: dict[str, list[ErrorCell]] = defaultdict(list)
        for run in runs:
            self.runs[run.source].append(run)
        self.all = frozenset(self.runs)
        self._fitted: dict[frozenset[str], ErrorQuantity] = {}

    def fit(self) -> None:
        """To all sources, and without each one and two of them, side by side from what all tell."""
        start = self.told(self.all).deviations
        left_out = [{*two} for two in combinations_with_replacement(sorted(self.all), 2)]
        some = [by for by in (self.all - two for two in left_out) if by]
        with pool(workers(0)) as processes:
            found = processes.map(likeliest, map(self.cells, some), repeat(start), chunksize=8)
            for by, deviations in zip(some, found, strict=True):
                self._fitted[by] = ErrorQuantity(deviations=deviations, cells=self.cells(by))

    def told(self, by: frozenset[str]) -> ErrorQuantity:
        """By these sources, not widened."""
        if by not in self._fitted:
            some = self.cells(by)
            self._fitted[by] = ErrorQuantity(deviations=likeliest(some), cells=some)
        return self._fitted[by]

    def cells(self, by: frozenset[str]) -> tuple[ErrorCell, ...]:
        return cells(run for source in sorted(by) for run in self.runs[source])


def _widened(known: _Sources, by: frozenset[str]) -> Deviations:
    """Fitted to the runs of these sources, and widened by what leaving out each of them tells."""
    single, paired = _Scores(), _Scores()
    for source in sorted(by) if len(by) > 1 else ():
        others, mine = known.told(by - {source}), known.runs[source]
        for cell, errors in _alike(mine).items():
            expected = spread(others, cell)
            single.add(np.abs(np.array(errors) - expected.mean) / expected.deviation, 1 / len(mine))
        for group in _pairs(others, mine):
            paired.add(group, 1 / len(group))
    fitted = known.told(by).deviations
    return msgspec.structs.replace(fitted, widening=single.widening(), ratio_widening=paired.widening())


class _Scores:
    """Errors in deviations of what was expected, and the weight of each."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.weights: list[float] = []

    def add(self, values: Iterable[float], weight: float) -> None:
        self.values += (values := list(map(float, values)))
        self.weights += [weight] * len(values)

    def widening(self) -> float:
        """By what a deviation is multiplied so that a nominal 90 % holds 90 % of the weight."""
        if not self.values:
            return 1.0
        nominal = float(ndtri((1 + NOMINAL) / 2))
        return round(weighted_quantile(self.values, self.weights, NOMINAL) / nominal, 4)


def _pairs(known: ErrorQuantity, runs: Sequence[ErrorCell]) -> list[list[float]]:
    """Scores of the ratios of the runs of one source that train the same network on the same machine type:
    those of one program, and those of two (another stack or precision)."""
    one_program: list[float] = []
    two_programs: list[float] = []
    for (cell, errors), (beside, others) in combinations_with_replacement(_alike(runs).items(), 2):
        if (cell.network, cell.hardware) != (beside.network, beside.hardware):
            continue
        expected = between(known, cell, beside)
        differences = np.subtract.outer(others, errors)
        if cell == beside:
            differences = differences[np.triu_indices(len(errors), 1)]
        scores = np.abs(differences - expected.mean) / expected.deviation
        (one_program if cell == beside else two_programs).extend(scores.ravel().tolist())
    return [group for group in (one_program, two_programs) if group]


def _alike(runs: Iterable[ErrorCell]) -> dict[ErrorCell, list[float]]:
    """The errors of runs that are alike in all levels."""
    found: dict[ErrorCell, list[float]] = defaultdict(list)
    for run in runs:
        found[msgspec.structs.replace(run, mean=0.0, squares=0.0)].append(run.mean)
    return found


def weighted_quantile(values: Sequence[float], weights: Sequence[float], share: float) -> float:
    """The least value that at least this share of the weight does not exceed."""
    order = np.argsort(values)
    reached = np.cumsum(np.array(weights)[order]) / np.sum(weights)
    return float(np.array(values)[order][min(int(np.searchsorted(reached, share - 1e-9)), len(values) - 1)])


def likeliest(known: Sequence[ErrorCell], start: Deviations | None = None) -> Deviations:
    """The deviations of the highest penalized likelihood of these cells. start: likely ones."""
    means, counts = np.array([cell.mean for cell in known]), np.array([cell.runs for cell in known])
    squares, free = sum(cell.squares for cell in known), int(np.sum(counts - 1))
    shared = {name: alike(name, known, known).astype(float) for name in LEVELS}
    shared = {name: same for name, same in shared.items() if same.any()}
    usual = max(float(np.std(means)) / len(shared) ** 0.5, SMALLEST)

    alone = np.diag(1 / counts)

    def cost(x: Array) -> tuple[float, Array]:
        """What is made small, and its slope."""
        sd = np.exp(x)
        parts = [d**2 * same for d, same in zip(sd, (*shared.values(), alone), strict=True)]
        inverse = np.linalg.inv(sum(parts) + 1e-9 * np.eye(len(means)))
        pulled = inverse @ means
        likelihood = 0.5 * (np.linalg.slogdet(inverse)[1] - means @ pulled)
        likelihood += -free * x[-1] - 0.5 * squares / sd[-1] ** 2 + np.sum(x[:-1] - sd[:-1] / usual)
        slope = np.array([pulled @ part @ pulled - np.sum(inverse * part) for part in parts])
        slope[:-1] += 1 - sd[:-1] / usual
        slope[-1] += -free + squares / sd[-1] ** 2
        return -float(likelihood), -slope

    names = (*shared, "run")
    bounds = [(log(SMALLEST), log(LARGEST))] * len(names)
    first = [log(getattr(start, name) if start else usual) for name in names]
    found = minimize(cost, np.array(first), jac=True, method="L-BFGS-B", bounds=bounds)
    return Deviations(**{name: round(float(np.exp(x)), 4) for name, x in zip(names, found.x, strict=True)})
