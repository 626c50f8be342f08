"""The hierarchical model of errors, fitted to published runs (mopsim.intervals: what it is, and its result).

Deviations are those of the highest penalized likelihood of the cells' means and of the scatter within them:
each is drawn off zero by a gamma prior of shape 2 (Chung et al. 2013, Psychometrika 78), which matters where
few groups tell little. Then all are widened or narrowed together, until a nominal 90 % of the runs of sources
that are left out is held, the sources weighing alike. A source that is left out takes no part in either.
"""

from collections.abc import Iterable, Sequence
from math import log

import msgspec
import numpy as np
from scipy.optimize import minimize
from scipy.special import ndtri

from mopsim.intervals.errors import LEVELS, Cell, Deviations, Quantity, cells
from mopsim.intervals.spread import Array, spread

NOMINAL = 0.9
"""The level whose coverage sets the widening."""
SMALLEST, LARGEST = 1e-3, 1.0
"""A deviation's bounds: a thousandth, and a factor e."""


def fit_errors(runs: Sequence[Cell]) -> Quantity:
    """The model of one quantity, from runs (cells of one each), and its deviations without each source."""
    without = {
        source: _deviations([run for run in runs if run.source != source]) for source in _sources(runs)
    }
    return Quantity(deviations=_deviations(runs), cells=cells(runs), without=without)


def _sources(runs: Iterable[Cell]) -> list[str]:
    return sorted({run.source for run in runs})


def _deviations(runs: Sequence[Cell]) -> Deviations:
    """Fitted to `runs`, and widened by what leaving out each of their sources tells."""
    scores, weights = [], []
    for source in _sources(runs):
        others = cells(run for run in runs if run.source != source)
        if not others:
            continue
        known = Quantity(deviations=likeliest(others), cells=others)
        mine = [run for run in runs if run.source == source]
        for run in mine:
            expected = spread(known, run)
            scores.append(abs(run.mean - expected.mean) / expected.deviation)
            weights.append(1 / len(mine))
    fitted = likeliest(cells(runs))
    if not scores:
        return fitted
    widening = weighted_quantile(scores, weights, NOMINAL) / float(ndtri((1 + NOMINAL) / 2))
    return msgspec.structs.replace(fitted, widening=round(widening, 4))


def weighted_quantile(values: Sequence[float], weights: Sequence[float], share: float) -> float:
    """The least value that at least this share of the weight does not exceed."""
    order = np.argsort(values)
    reached = np.cumsum(np.array(weights)[order]) / np.sum(weights)
    return float(np.array(values)[order][min(int(np.searchsorted(reached, share - 1e-9)), len(values) - 1)])


def likeliest(known: Sequence[Cell]) -> Deviations:
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


def _names(known: Sequence[Cell]) -> list[np.ndarray]:
    return [np.array([cell.level(level) for cell in known]) for level in LEVELS]
