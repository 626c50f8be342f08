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
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations_with_replacement, repeat
from math import exp, log
from typing import NamedTuple

import msgspec
import numpy as np
from scipy.linalg.lapack import dpotrf, dpotri
from scipy.optimize import brentq, minimize
from scipy.special import expit, ndtri

from mopsim.common.processes import pool, workers
from mopsim.intervals.errors import LEVELS, Array, Deviations, ErrorCell, ErrorQuantity, alike, cells
from mopsim.intervals.made import ALWAYS
from mopsim.intervals.spread import joint, spread
from mopsim.spec.categories import STEP_PARTS

NOMINAL = 0.9
"""The level whose coverage sets the widening."""
FITTED = (*LEVELS, "run")
"""Parts of an error whose deviations are fitted together."""
SMALLEST, LARGEST = 1e-3, 1.0
"""A deviation's bounds: a thousandth, and a factor e."""
MANY = 10
"""Sources from which on no pair of them is most of what is known."""
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
    known.fit()
    sources = sorted(known.all)
    with pool(workers(0)) as processes:
        without = dict(
            zip(
                sources,
                processes.map(_widened, repeat(known), (known.all - {one} for one in sources)),
                strict=True,
            )
        )
    whole = known.told(known.all)
    deviations = fit_unseen(known, first or {}, _widened(known, known.all), some)
    return msgspec.structs.replace(whole, deviations=deviations, without=without)


def fit_unseen(
    known: "_Sources",
    first: Mapping[str, Sequence[ErrorCell]],
    deviations: Deviations,
    some: bool = False,
) -> Deviations:
    """With what a nominal 90 % of the first scores is held beside the deviations that are fitted to the
    sources of earlier sets; the sources weigh alike. 0 where there are none, or nothing is needed. some: the
    likeliest share of the programs has it, and the likeliest size."""
    scores = _Scores()
    later = {run.source for scored in first.values() for run in scored}
    for scored in first.values():
        earlier = known.told(known.all - later)
        often = Counter(run.source for run in scored)
        for run in scored:
            ((cell, alike),) = _alike(earlier, [run]).items()
            expected = spread(earlier, cell)
            off = abs(alike.errors[0] - expected.mean)
            scores.add([off], 1 / often[run.source], expected.as_described.deviation)
        later -= often.keys()
    unseen, share = scores.beside(deviations.widening), 1.0
    if some and unseen:
        unseen, share = scores.of_some(deviations.widening)
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
        self._fitted: dict[frozenset[str], ErrorQuantity] = {}

    def fit(self) -> None:
        """To all sources, and without each one, side by side from what all tell."""
        start = self.told(self.all).deviations
        some = [by for source in sorted(self.all) if (by := self.all - {source})]
        with pool(workers(0)) as processes:
            found = processes.map(likeliest, map(self.cells, some), repeat(start))
            for by, deviations in zip(some, found, strict=True):
                self._fitted[by] = self._of(deviations, self.cells(by))

    def told(self, by: frozenset[str]) -> ErrorQuantity:
        """By these sources, not widened."""
        if by not in self._fitted:
            some = self.cells(by)
            self._fitted[by] = self._of(self._without_two(by) or likeliest(some), some)
        return self._fitted[by]

    def _without_two(self, by: frozenset[str]) -> Deviations | None:
        """Where two sources are missing from many: what each of them moves in logs is added, which is right
        to first order. Fits of all pairs move no widening by more than 2 % (0.1 % of step times), and take
        ten times as long."""
        missing = [self._fitted.get(self.all - {source}) for source in self.all - by]
        if len(missing) != 2 or len(by) < MANY or None in missing:
            return None
        whole, one, other = (
            {name: getattr(known.deviations, name) for name in FITTED}
            for known in (self._fitted[self.all], *filter(None, missing))
        )
        moved = {name: one[name] * other[name] / base for name, base in whole.items() if base}
        return Deviations(**whole | {name: min(max(x, SMALLEST), LARGEST) for name, x in moved.items()})

    def cells(self, by: frozenset[str]) -> tuple[ErrorCell, ...]:
        """Of these sources, in units of a usual run's error."""
        usual = self._of(Deviations(**dict.fromkeys(FITTED, 0.0)), ()).usual
        return cells(usual(run) for source in sorted(by) for run in self.runs[source])

    def _of(self, deviations: Deviations, some: tuple[ErrorCell, ...]) -> ErrorQuantity:
        return ErrorQuantity(deviations=deviations, parts=self.parts, cells=some)


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


def _widened(known: _Sources, by: frozenset[str]) -> Deviations:
    """Fitted to the runs of these sources, and widened by what leaving out each of them tells."""
    single, paired = _Scores(), _Scores()
    for source in sorted(by) if len(by) > 1 else ():
        others, mine = known.told(by - {source}), known.runs[source]
        runs = _alike(others, mine)
        means, covariances = joint(others, (*runs, *runs))
        for some, mean, variance in zip(runs.values(), means, np.diag(covariances), strict=False):
            single.add(np.abs(some.errors - mean) / variance**0.5, 1 / len(mine))
        for group in _pairs(runs, means, covariances):
            paired.add(group, 1 / len(group))
    fitted = known.told(by).deviations
    return msgspec.structs.replace(fitted, widening=single.widening(), ratio_widening=paired.widening())


class _Scores:
    """Errors in deviations of what was expected, and the weight of each; or errors, and the deviations."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.weights: list[float] = []
        self.deviations: list[float] = []

    def add(self, values: Iterable[float], weight: float, deviation: float = 1.0) -> None:
        self.values += (values := list(map(float, values)))
        self.weights += [weight] * len(values)
        self.deviations += [deviation] * len(values)

    def widening(self) -> float:
        """By what a deviation is multiplied so that a nominal 90 % holds 90 % of the weight."""
        if not self.values:
            return 1.0
        nominal = float(ndtri((1 + NOMINAL) / 2))
        return round(weighted_quantile(self.values, self.weights, NOMINAL) / nominal, 4)

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


def _pairs(runs: Mapping[ErrorCell, "_Alike"], means: Array, covariances: Array) -> list[list[float]]:
    """Scores of the ratios of the runs of one source that train the same network on the same machine type:
    those of one program, and those of two (another stack or precision). The means and covariances are of a
    run of each of the cells, and of another one of each."""
    one_program: list[float] = []
    two_programs: list[float] = []
    for (i, (cell, some)), (k, (beside, others)) in combinations_with_replacement(enumerate(runs.items()), 2):
        if (cell.network, cell.hardware) != (beside.network, beside.hardware):
            continue
        differences = np.subtract.outer(
            others.scales * (others.errors - means[k]), some.scales * (some.errors - means[i])
        )
        variances = np.add.outer(others.scales**2 * covariances[k, k], some.scales**2 * covariances[i, i])
        variances -= 2 * covariances[i, len(runs) + k] * np.outer(others.scales, some.scales)
        scores = np.abs(differences) / np.sqrt(variances)
        if cell == beside:
            scores = scores[np.triu_indices(len(some.errors), 1)]
        (one_program if cell == beside else two_programs).extend(scores.ravel().tolist())
    return [group for group in (one_program, two_programs) if group]


class _Alike(NamedTuple):
    """Runs alike in all levels: their errors in units of a usual run's, and by what these exceed it."""

    errors: Array
    scales: Array


def _alike(known: ErrorQuantity, runs: Iterable[ErrorCell]) -> dict[ErrorCell, _Alike]:
    found: dict[ErrorCell, list[tuple[float, float]]] = defaultdict(list)
    for run in runs:
        usual = known.usual(run)
        found[msgspec.structs.replace(usual, mean=0.0, squares=0.0)].append(
            (usual.mean, known.scale(run.made))
        )
    return {cell: _Alike(*np.array(some).T) for cell, some in found.items()}


def weighted_quantile(values: Sequence[float] | Array, weights: Sequence[float], share: float) -> float:
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
    parts = np.array([*shared.values(), np.diag(1 / counts)]).reshape(-1, len(means) ** 2)
    nothing = 1e-9 * np.eye(len(means))

    def cost(x: Array) -> tuple[float, Array]:
        """What is made small, and its slope."""
        sd = np.exp(x)
        root, _ = dpotrf((sd**2 @ parts).reshape(nothing.shape) + nothing, lower=1)
        below, _ = dpotri(root, lower=1)
        inverse = np.tril(below, -1) + np.tril(below).T
        pulled = inverse @ means
        likelihood = -np.sum(np.log(np.diag(root))) - 0.5 * means @ pulled
        likelihood += -free * x[-1] - 0.5 * squares / sd[-1] ** 2 + np.sum(x[:-1] - sd[:-1] / usual)
        slope = sd**2 * (parts @ (np.outer(pulled, pulled) - inverse).ravel())
        slope[:-1] += 1 - sd[:-1] / usual
        slope[-1] += -free + squares / sd[-1] ** 2
        return -float(likelihood), -slope

    names = (*shared, "run")
    bounds = [(log(SMALLEST), log(LARGEST))] * len(names)
    first = [log(getattr(start, name) if start else usual) for name in names]
    found = minimize(cost, np.array(first), jac=True, method="L-BFGS-B", bounds=bounds)
    return Deviations(**{name: round(float(np.exp(x)), 4) for name, x in zip(names, found.x, strict=True)})
