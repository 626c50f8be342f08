"""The hierarchical model of errors, fitted to published runs (mopsim.intervals: what it is, and its result).

Deviations are those of the highest penalized likelihood of the cells' means and of the scatter within them:
each is drawn off zero by a gamma prior of shape 2 (Chung et al. 2013, Psychometrika 78), which matters where
few groups tell little. Then all are widened or narrowed together, until a nominal 90 % of the runs of sources
that are left out is held, the sources weighing alike; and once more for the ratios of two of their runs. A
source that is left out takes no part in either.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations_with_replacement
from math import log

import msgspec
import numpy as np
from scipy.optimize import minimize
from scipy.special import ndtri

from mopsim.intervals.errors import LEVELS, Deviations, ErrorCell, ErrorQuantity, cells
from mopsim.intervals.spread import Array, between, spread

NOMINAL = 0.9
"""The level whose coverage sets the widening."""
SMALLEST, LARGEST = 1e-3, 1.0
"""A deviation's bounds: a thousandth, and a factor e."""


def fit_errors(runs: Sequence[ErrorCell]) -> ErrorQuantity:
    """The model of one quantity, from runs (cells of one each), and its deviations without each source."""
    without = {
        source: _deviations([run for run in runs if run.source != source]) for source in _sources(runs)
    }
    return ErrorQuantity(deviations=_deviations(runs), cells=cells(runs), without=without)


def _sources(runs: Iterable[ErrorCell]) -> list[str]:
    return sorted({run.source for run in runs})


def _deviations(runs: Sequence[ErrorCell]) -> Deviations:
    """Fitted to `runs`, and widened by what leaving out each of their sources tells."""
    single, paired = _Scores(), _Scores()
    for source in _sources(runs):
        others = cells(run for run in runs if run.source != source)
        if not others:
            continue
        known = ErrorQuantity(deviations=likeliest(others), cells=others)
        mine = [run for run in runs if run.source == source]
        for run in mine:
            expected = spread(known, run)
            single.add([abs(run.mean - expected.mean) / expected.deviation], 1 / len(mine))
        for group in _pairs(known, mine):
            paired.add(group, 1 / len(group))
    fitted = likeliest(cells(runs))
    return msgspec.structs.replace(fitted, widening=single.widening(), ratio_widening=paired.widening())


class _Scores:
    """Errors in deviations of what was expected, and the weight of each."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.weights: list[float] = []

    def add(self, values: Sequence[float], weight: float) -> None:
        self.values += values
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
    alike: dict[ErrorCell, list[float]] = defaultdict(list)
    for run in runs:
        alike[msgspec.structs.replace(run, mean=0.0, squares=0.0)].append(run.mean)
    one_program: list[float] = []
    two_programs: list[float] = []
    for (cell, errors), (beside, others) in combinations_with_replacement(alike.items(), 2):
        if (cell.network, cell.hardware) != (beside.network, beside.hardware):
            continue
        expected = between(known, cell, beside)
        differences = np.subtract.outer(others, errors)
        if cell == beside:
            differences = differences[np.triu_indices(len(errors), 1)]
        scores = np.abs(differences - expected.mean) / expected.deviation
        (one_program if cell == beside else two_programs).extend(scores.ravel().tolist())
    return [group for group in (one_program, two_programs) if group]


def weighted_quantile(values: Sequence[float], weights: Sequence[float], share: float) -> float:
    """The least value that at least this share of the weight does not exceed."""
    order = np.argsort(values)
    reached = np.cumsum(np.array(weights)[order]) / np.sum(weights)
    return float(np.array(values)[order][min(int(np.searchsorted(reached, share - 1e-9)), len(values) - 1)])


def likeliest(known: Sequence[ErrorCell]) -> Deviations:
    """The deviations of the highest penalized likelihood of these cells."""
    means, counts = np.array([cell.mean for cell in known]), np.array([cell.runs for cell in known])
    squares, free = sum(cell.squares for cell in known), int(np.sum(counts - 1))
    usual = max(float(np.std(means)) / len(LEVELS) ** 0.5, SMALLEST)
    shared = [np.equal.outer(names, names).astype(float) for names in _names(known)]

    def cost(x: Array) -> float:
        sd = np.exp(x)
        between = sum(d**2 * same for d, same in zip(sd, shared, strict=False))
        factor = np.linalg.cholesky(between + np.diag(sd[-1] ** 2 / counts) + 1e-9 * np.eye(len(means)))
        whitened = np.linalg.solve(factor, means)
        likelihood = -0.5 * whitened @ whitened - np.log(np.diag(factor)).sum()
        likelihood += -free * x[-1] - 0.5 * squares / sd[-1] ** 2
        return float(-(likelihood + np.sum(x[:-1] - sd[:-1] / usual)))

    bounds = [(log(SMALLEST), log(LARGEST))] * (len(LEVELS) + 1)
    found = minimize(cost, np.full(len(LEVELS) + 1, log(usual)), method="L-BFGS-B", bounds=bounds)
    names = (*LEVELS, "run")
    return Deviations(**{name: round(float(np.exp(x)), 4) for name, x in zip(names, found.x, strict=True)})


def _names(known: Sequence[ErrorCell]) -> list[np.ndarray]:
    return [np.array([cell.level(level) for cell in known]) for level in LEVELS]
