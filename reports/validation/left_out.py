"""Runs of sources that are left out, in deviations of what the others make expected of them.

Leaving out a source takes no factor of its own. Let P be the inverse of the covariance of all cells' means m,
and b the cells of the source: given the others, these have the covariance inv(P[b, b]), and lie inv(P[b, b])
(P m)[b] off what is expected of them (Ginsbourger & Schaerer, arXiv 2101.03108: cross-validation in folds).
So it is with two sources; other deviations, which differ by little in logs, move both to first order.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray
from scipy.linalg.lapack import dpotrf, dpotri
from scipy.sparse import csr_array, diags_array, vstack

from mopsim.intervals.errors import LEVELS, Array, Deviations, ErrorCell, ErrorQuantity, run_variances

FITTED = (*LEVELS, "run")
"""Parts of an error whose deviations are fitted together."""
NOTHING = Deviations(**dict.fromkeys(FITTED, 0.0))
Numbers = NDArray[np.int_]


def inverse_of(covariance: Array) -> tuple[Array, float]:
    """The inverse, and the log of the determinant of what is inverted."""
    root, _ = dpotrf(covariance, lower=1)
    below, _ = dpotri(root, lower=1)
    inverse = below + below.T  # of `below` the rest is 0
    np.fill_diagonal(inverse, np.diag(below))
    return inverse, 2 * float(np.sum(np.log(np.diag(root))))


class Groups:
    """Which cells are of each group of each level."""

    def __init__(self, cells: Sequence[ErrorCell]) -> None:
        numbers: dict[tuple[int, str], int] = {}
        members = [
            (numbers.setdefault((level, name), len(numbers)), i)
            for level, what in enumerate(LEVELS)
            for i, cell in enumerate(cells)
            if (name := cell.level(what))
        ]
        self.rows, self.columns = np.array(members).T
        self.levels = np.array([level for level, _ in numbers])
        shape = (len(numbers), len(cells))
        self.matrix: Any = csr_array((np.ones(len(members)), (self.rows, self.columns)), shape=shape)


class Expected(NamedTuple):
    """Of the cells of a source (their numbers), what others tell: means, covariances of what their runs have
    in common, and the variance of a run's own part."""

    cells: Numbers
    means: Array
    covariances: Array
    run: float


class Scores(NamedTuple):
    """Errors in deviations of what was expected, and the weight of each."""

    values: Array
    weights: Array


class Folds:
    """Runs and their pairs by cell: what is the same whichever source is left out. Two runs are a pair where
    one source trains the same network on the same machine type in both."""

    def __init__(self, known: ErrorQuantity, runs: Mapping[str, Sequence[ErrorCell]]) -> None:
        self._of = {one: np.flatnonzero([cell.source == one for cell in known.cells]) for one in runs}
        self._means = np.array([cell.mean for cell in known.cells])
        self._scatter, self._by_run = _own_variances(known.cells)
        groups = Groups(known.cells)
        self._parts = vstack([groups.matrix, diags_array(self._by_run**0.5)], format="csr")
        self._levels = np.append(groups.levels, np.full(len(known.cells), len(LEVELS)))
        every = [run for source in sorted(runs) for run in runs[source]]
        usual = [known.usual(run) for run in every]
        number = {_bare(cell): i for i, cell in enumerate(known.cells)}
        self._cell = np.array([number[_bare(run)] for run in usual])
        self._errors = np.array([run.mean for run in usual])
        self._scales = np.array([known.scale(run.made) for run in every])
        self._weights = np.array([1 / len(runs[run.source]) for run in every])
        self._pairs, self._pair_weights = _pairs(every, self._cell)

    def expected(
        self, sd: Deviations, left_out: Iterable[tuple[tuple[str, ...], Array]]
    ) -> Iterator[list[Expected]]:
        """Of each of some sources, by all but these sources; beside these, what the deviations differ by in
        logs from `sd`."""
        sds = np.array([getattr(sd, name) for name in FITTED])
        parts = self._parts.copy()
        parts.data *= np.repeat(sds[self._levels], np.diff(parts.indptr))
        inverse, _ = inverse_of((parts.T @ parts).toarray() + np.diag(self._scatter))
        pulled, by_part = inverse @ self._means, np.ascontiguousarray((parts @ inverse).T)
        part_pulled = parts @ pulled
        for sources, logs in left_out:
            cells = np.concatenate([self._of[source] for source in sources])
            covariance = among = np.linalg.inv(inverse[np.ix_(cells, cells)])
            off = among @ pulled[cells]
            if logs.any():
                moving = by_part[cells] * (2 * logs)[self._levels]
                covariance = among + among @ (moving @ by_part[cells].T) @ among
                off = covariance @ pulled[cells] - among @ (moving @ part_pulled)
            alone = self._scatter[cells] + self._by_run[cells] * sd.run**2 * (1 + 2 * logs[-1])
            means, shared = self._means[cells] - off, covariance - np.diag(alone)
            run = float(np.exp(logs[-1]) * sd.run) ** 2
            ends = np.cumsum([0, *(len(self._of[source]) for source in sources)])
            yield [Expected(cells[i:k], means[i:k], shared[i:k, i:k], run) for i, k in pairwise(ends)]

    def scores(self, expected: Iterable[Expected]) -> tuple[Scores, Scores]:
        """Of the runs of these sources, which weigh alike, and of the ratios of two runs: those of one
        program weigh as much as those of two (another stack or precision)."""
        means, alone = np.full((2, len(self._means)), np.nan)
        shared = np.zeros((len(self._means),) * 2)
        for one in expected:
            means[one.cells], alone[one.cells] = one.means, one.run
            shared[np.ix_(one.cells, one.cells)] = one.covariances
        np.fill_diagonal(shared, np.maximum(np.diag(shared), 0.0))
        off, variances = self._errors - means[self._cell], (np.diag(shared) + alone)[self._cell]
        single, told = np.abs(off) / variances**0.5, np.isfinite(off)
        i, k = self._pairs
        scaled, among = self._scales * off, self._scales**2 * variances
        common = shared[self._cell[i], self._cell[k]] * self._scales[i] * self._scales[k]
        paired = np.abs(scaled[i] - scaled[k]) / np.sqrt(among[i] + among[k] - 2 * common)
        return (
            Scores(single[told], self._weights[told]),
            Scores(paired[told[i]], self._pair_weights[told[i]]),
        )


def _bare(cell: ErrorCell) -> ErrorCell:
    return replace(cell, made=(), runs=1, mean=0.0, squares=0.0)


def _own_variances(cells: Sequence[ErrorCell]) -> tuple[Array, Array]:
    """Variances of the cells' means by what their runs have alone: where the deviation of all runs is 0, and
    what its square adds, by which it is multiplied."""
    none, one = (
        np.array([variances[cell.source] / cell.runs for cell in cells])
        for variances in (run_variances(cells, replace(NOTHING, run=run)) for run in (0.0, 1.0))
    )
    return none, one - none


def _pairs(runs: Sequence[ErrorCell], cell: Numbers) -> tuple[Numbers, Array]:
    """The numbers of the two runs of each pair, and its weight. cell: of each run."""
    places: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for i, run in enumerate(runs):
        places[run.source, run.network, run.hardware].append(i)
    pairs = np.concatenate([np.array(at)[np.array(np.triu_indices(len(at), 1))] for at in places.values()], 1)
    _, sources = np.unique([run.source for run in runs], return_inverse=True)
    kinds = 2 * sources[pairs[0]] + (cell[pairs[0]] == cell[pairs[1]])
    return pairs, 1 / np.bincount(kinds)[kinds]
