"""The hierarchical model of errors, fitted to published runs (mopsim.intervals: what it is, and its result).

Deviations are those of the highest penalized likelihood of the cells' means and of the scatter within them:
each is drawn off zero by a gamma prior of shape 2 (Chung et al. 2013, Psychometrika 78), which matters where
few groups tell little. Then all are widened or narrowed together, until a nominal 90 % of the runs of sources
that are left out is held, the sources weighing alike; and once more for the ratios of two of their runs. A
source that is left out takes no part in either. Programs are mended after a look at their runs' errors, so
that what is left of these tells little of a source that nobody has looked at: runs that were scored before
anything was learned from them (first_scores.csv) say what such a source has beside (`unseen`). Before all
this errors are divided by what the parts of their steps make them exceed a usual one's.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from math import exp, log

import msgspec
import numpy as np
from scipy.optimize import brentq, minimize
from scipy.sparse import diags_array
from scipy.special import expit, ndtri

from mopsim.intervals.errors import LEVELS, Array, Deviations, ErrorCell, ErrorQuantity, cells
from mopsim.intervals.made import ALWAYS
from mopsim.intervals.spread import spread
from mopsim.spec.categories import STEP_PARTS
from reports.validation.left_out import FITTED, NOTHING, Expected, Folds, Groups, Scores, inverse_of

NOMINAL = 0.9
"""The level whose coverage sets the widening."""
SMALLEST, LARGEST = 1e-3, 1.0
"""A deviation's bounds: a thousandth, and a factor e."""
TOLD_APART = 0.005
"""A deviation of some programs that is less than sources round to is none."""
MANY = 10
"""Sources from which on no pair of them is most of what is known."""
SMALL = 0.05
"""What deviations may move by, in logs, for what they make expected to be told from its slope: the rest is of
second order, a quarter of a percent."""
USUAL, NEAR, FREEDOM = 0.14, 0.005, 4
"""What a part is taken to be off by before any run tells (its square near e^-4), the weight
by which it is drawn there, and the degrees of freedom of the t: errors have far outliers."""


def fit_errors(
    runs: Sequence[ErrorCell], first: Mapping[str, Sequence[ErrorCell]] | None = None, some: bool = False
) -> ErrorQuantity:
    """The model of one quantity, from runs (cells of one each), and its deviations without each source.
    first: by set, in the order in which they were scored, runs off by what they were before anything was
    learned; some: whether only some of the programs may be off by more than their levels say."""
    known = _Sources(runs)
    without = {one: known.widened(known.all - {one}) for one in sorted(known.all)}
    deviations = fit_unseen(known, first or {}, known.widened(known.all), some)
    return msgspec.structs.replace(known.whole, deviations=deviations, without=without)


def fit_unseen(
    known: "_Sources",
    first: Mapping[str, Sequence[ErrorCell]],
    deviations: Deviations,
    some: bool = False,
) -> Deviations:
    """With what a nominal 90 % of the first scores is held beside the deviations that are fitted to the
    sources of earlier sets; the sources weigh alike. 0 where there are none, or nothing is needed. some: the
    likeliest share of the programs has it, and the likeliest size."""
    scores = _FirstScores()
    later = {run.source for scored in first.values() for run in scored}
    for scored in first.values():
        earlier = known.told(known.all - later)
        often = Counter(run.source for run in scored)
        for run in scored:
            usual = earlier.usual(run)
            expected = spread(earlier, usual)
            off = abs(usual.mean - expected.mean)
            scores.add(off, 1 / often[run.source], expected.as_described.deviation)
        later -= often.keys()
    unseen, share = scores.beside(deviations.widening), 1.0
    if some and unseen:
        unseen, share = scores.of_some(deviations.widening)
        if unseen < TOLD_APART:
            unseen, share = 0.0, 1.0
    return msgspec.structs.replace(deviations, unseen=unseen, unseen_share=share)


class _Sources:
    """Runs by source, and what some of the sources tell, fitted once. What parts are off by is told by all of
    them: few numbers, and of no source alone."""

    def __init__(self, runs: Sequence[ErrorCell]) -> None:
        self.runs: dict[str, list[ErrorCell]] = defaultdict(list)
        for run in runs:
            self.runs[run.source].append(run)
        self.all = frozenset(self.runs)
        self.parts = fit_parts(runs)
        usual = ErrorQuantity(deviations=NOTHING, parts=self.parts, cells=()).usual
        self.cells = cells(map(usual, runs))
        self._fitted: dict[frozenset[str], Deviations] = {}

    @cached_property
    def whole(self) -> ErrorQuantity:
        """By all sources, not widened."""
        return self.told(self.all)

    @cached_property
    def _folds(self) -> Folds:
        return Folds(self.whole, self.runs)

    def told(self, by: frozenset[str]) -> ErrorQuantity:
        """By these sources, not widened."""
        some = tuple(cell for cell in self.cells if cell.source in by)
        return ErrorQuantity(deviations=self.fitted(by), parts=self.parts, cells=some)

    def fitted(self, by: frozenset[str]) -> Deviations:
        """To these sources, from what all tell."""
        if by not in self._fitted:
            some = tuple(cell for cell in self.cells if cell.source in by)
            start = self.fitted(self.all) if by != self.all else None
            self._fitted[by] = likeliest(some, start)
        return self._fitted[by]

    def widened(self, by: frozenset[str]) -> Deviations:
        """Fitted to all sources or all but one, and widened by what leaving out each of them tells."""
        single, paired = self._folds.scores(self._left_out[self.all - by])
        return msgspec.structs.replace(
            self.fitted(by), widening=_widening(single), ratio_widening=_widening(paired)
        )

    @cached_property
    def _left_out(self) -> dict[frozenset[str], list[Expected]]:
        """What others make expected of each source, by which other one is left out too, if any. Of two, the
        deviations are those without the one that moves them more, moved as the other does."""
        found: dict[frozenset[str], list[Expected]] = {frozenset(): []}
        found |= {frozenset({one}): [] for one in self.all}
        moves = {one: self._moves(one) for one in sorted(self.all)}
        largest = {one: float(np.max(np.abs(logs))) for one, logs in moves.items()}
        order, still = sorted(moves, key=lambda one: -largest[one]), np.zeros(len(FITTED))
        for i, one in enumerate(order):
            sd, others = self.fitted(self.all - {one}), order[i + 1 :]
            near = [other for other in others if len(order) > MANY + 1 and largest[other] <= SMALL]
            far = others[: len(others) - len(near)]
            both = [((one, other), moves[other]) for other in near]
            ((alone,), *pairs) = self._folds.expected(sd, [((one,), still), *both])
            found[frozenset()].append(alone)
            for other in far:
                pairs += self._folds.expected(self._without_two(one, other), [((one, other), still)])
            for other, (mine, its) in zip((*near, *far), pairs, strict=True):
                found[frozenset({other})].append(mine)
                found[frozenset({one})].append(its)
        return found

    def _moves(self, source: str) -> Array:
        """What the deviations move by without a source, in logs."""
        whole, others = (
            np.array([max(getattr(sd, name), SMALLEST) for name in FITTED])
            for sd in (self.fitted(self.all), self.fitted(self.all - {source}))
        )
        logs: Array = np.log(others / whole)
        return logs

    def _without_two(self, one: str, other: str) -> Deviations:
        """From many sources each of the two takes what it takes from all, which is right to first order: fits
        of all pairs move no widening by more than 2 % (0.1 % of step times)."""
        if len(self.all) > MANY + 1:
            return _moved(self.fitted(self.all - {one}), self._moves(other))
        return self.fitted(self.all - {one, other})


def _moved(sd: Deviations, logs: Array) -> Deviations:
    """What does not exist stays so."""
    found = {name: getattr(sd, name) * exp(log) for name, log in zip(FITTED, logs, strict=True)}
    return Deviations(**{name: one and min(max(one, SMALLEST), LARGEST) for name, one in found.items()})


def fit_parts(runs: Sequence[ErrorCell]) -> dict[str, float]:
    """How far off each part of a step is, over a usual run's error: where Student's t of the runs' errors is
    likeliest, the sources weighing alike. Empty where nothing is known of what predictions are made of."""
    known = {bool(run.made) for run in runs}
    if known != {True}:
        assert known == {False}, "of some runs it is known what their predictions are made of, of others not"
        return {}
    often = Counter(run.source for run in runs)
    weights = np.array([1 / often[run.source] for run in runs])
    found = np.array([run.mean for run in runs])
    squares = (found - np.average(found, weights=weights)) ** 2
    shares = np.array([(1.0, *run.made) for run in runs]) ** 2

    def variances(x: Array) -> Array:
        return shares @ np.exp(x) + SMALLEST**2

    def cost(x: Array) -> float:
        among = variances(x)
        tails = (FREEDOM + 1) * np.log1p(squares / among / FREEDOM)
        return float(0.5 * weights @ (np.log(among) + tails) + NEAR * np.sum((x - log(USUAL**2)) ** 2))

    start = np.full(shares.shape[1], log(USUAL**2))
    x = minimize(
        cost, start, method="L-BFGS-B", bounds=[(2 * log(SMALLEST), 2 * log(LARGEST))] * len(start)
    ).x
    usual = exp(np.average(np.log(variances(x)), weights=weights) / 2)
    return dict(zip((ALWAYS, *STEP_PARTS), (round(exp(one / 2) / usual, 3) for one in x), strict=True))


class _FirstScores:
    """Runs' distances from what was expected, the weight of each, and the deviation."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.weights: list[float] = []
        self.deviations: list[float] = []

    def add(self, value: float, weight: float, deviation: float) -> None:
        self.values.append(value)
        self.weights.append(weight)
        self.deviations.append(deviation)

    def beside(self, widening: float) -> float:
        """The deviation that all are to have beside their own, widened alike, so that a nominal 90 % holds 90
        % of the weight."""
        values, own = np.array(self.values), np.array(self.deviations)

        def over(more: float) -> float:
            scores = values / (widening * np.sqrt(own**2 + more**2))
            return weighted_quantile(scores, self.weights, NOMINAL) - float(ndtri((1 + NOMINAL) / 2))

        return round(float(brentq(over, 0.0, 10.0)), 4) if self.values and over(0.0) > 0 else 0.0

    def of_some(self, widening: float) -> tuple[float, float]:
        """(The deviation that some programs have beside their own, widened alike; their share): the
        likeliest."""
        values, own, weights = map(np.array, (self.values, self.deviations, self.weights))

        def cost(x: Array) -> float:
            share = expit(x[1])
            among = np.log(widening * np.array([own, np.hypot(own, exp(x[0]))]))
            both = -0.5 * (values / np.exp(among)) ** 2 - among + np.log([[1 - share], [share]])
            return -float(weights @ np.logaddexp(*both))

        bounds = [(log(SMALLEST), log(LARGEST)), (-5.0, 5.0)]
        found = minimize(cost, np.array([log(USUAL), 0.0]), method="L-BFGS-B", bounds=bounds).x
        return round(exp(found[0]), 4), round(float(expit(found[1])), 4)


def _widening(scores: Scores) -> float:
    """By what a deviation is multiplied so that a nominal 90 % holds 90 % of the weight."""
    if not len(scores.values):
        return 1.0
    return round(weighted_quantile(*scores, NOMINAL) / float(ndtri((1 + NOMINAL) / 2)), 4)


def weighted_quantile(
    values: Sequence[float] | Array, weights: Sequence[float] | Array, share: float
) -> float:
    """The least value that at least this share of the weight does not exceed."""
    order = np.argsort(values)
    reached = np.cumsum(np.array(weights)[order]) / np.sum(weights)
    return float(np.array(values)[order][min(int(np.searchsorted(reached, share - 1e-9)), len(values) - 1)])


def likeliest(known: Sequence[ErrorCell], start: Deviations | None = None) -> Deviations:
    """The deviations of the highest penalized likelihood of these cells. start: likely ones."""
    means, counts = np.array([cell.mean for cell in known]), np.array([cell.runs for cell in known])
    squares, free = sum(cell.squares for cell in known), int(np.sum(counts - 1))
    groups = Groups(known)
    members, levels = np.unique(groups.levels, return_inverse=True)
    usual = max(float(np.std(means)) / len(members) ** 0.5, SMALLEST)

    def cost(x: Array) -> tuple[float, Array]:
        """What is made small, and its slope."""
        sd = np.exp(x)
        shared = groups.matrix.T @ (diags_array(sd[levels] ** 2) @ groups.matrix)
        inverse, size = inverse_of(shared.toarray() + np.diag(sd[-1] ** 2 / counts + 1e-9))
        pulled = inverse @ means
        likelihood = -0.5 * (size + means @ pulled)
        likelihood += -free * x[-1] - 0.5 * squares / sd[-1] ** 2 + np.sum(x[:-1] - sd[:-1] / usual)
        within = (groups.matrix @ inverse)[groups.rows, groups.columns]
        by_group = (groups.matrix @ pulled) ** 2 - np.bincount(groups.rows, within)
        own = np.sum((pulled**2 - np.diag(inverse)) / counts)
        slope = sd**2 * np.append(np.bincount(levels, by_group), own)
        slope[:-1] += 1 - sd[:-1] / usual
        slope[-1] += -free + squares / sd[-1] ** 2
        return -float(likelihood), -slope

    names = (*(LEVELS[level] for level in members), "run")
    bounds = [(log(SMALLEST), log(LARGEST))] * len(names)
    first = [log(getattr(start, name) if start else usual) for name in names]
    found = minimize(cost, np.array(first), jac=True, method="L-BFGS-B", bounds=bounds)
    return Deviations(**{name: round(float(np.exp(x)), 4) for name, x in zip(names, found.x, strict=True)})
