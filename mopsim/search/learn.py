"""What simulations teach of the candidates that were not simulated: their memory and their time.

Both correct closed-form estimates (`mopsim.search.bound`, `mopsim.search.guess`) and order the work; only
bounds and simulations reject a candidate.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mopsim.search.problem import Column, once
from mopsim.search.wires import Reals

_GIB = float(2**30)
_ODD = 4.5
"""Deviations, in medians of all, from which a step time is taken to be odd."""
LATELY = 8
"""Simulations whose misses tell how memory is best expected."""
JOINED = 1 << 12
"""Combinations of values up to which columns are looked up together: their sums fit the cache."""
ALL = slice(None)
Places = slice | Column
"""Candidates: ALL, or their positions."""
_DOUBT = 0.02
"""Weight of the assumption that what is gathered takes what the closed form says, beside one simulation."""


def found_at(known: dict[Any, Any], key: Hashable, at: Places, find: Callable[[Places], Reals]) -> Reals:
    """Something of candidates, the last axis: of all found once, of some each time if not of all yet."""
    if at is ALL:
        return once(known, key, lambda: find(ALL))
    return known[key][..., at] if key in known else find(at)


@dataclass
class Memory:
    """Peak memory above its lower bound: as many times the bound as what was simulated by median; or per kind
    of candidate a constant (the gathered weights), a slope in the tokens of a rank and a share of the bound,
    all at least 0. The one counts that was closer to what was simulated lately, before that taught it.

    parts: bytes or tokens of each candidate, a row for each regressor, the gathered weights first. kinds: of
    each candidate, those whose transients are alike. misses: logarithms of what (each of the two) expected
    over what was simulated.
    """

    bound: Reals
    parts: Reals
    kinds: Column
    seen: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    misses: list[tuple[float, float]] = field(default_factory=list)
    _known: dict[Hashable, Any] = field(default_factory=dict)

    def learn(self, position: int, peak: float) -> None:
        """Note the simulated peak of a candidate, bytes."""
        kind, bound = int(self.kinds[position]), float(self.bound[position])
        if self.times:
            share, fixed = (float(one[0]) for one in self._of_kind(np.array([position])))
            both = bound * (1.0 + share) + fixed, bound * median(self.times)
            self.misses.append((math.log(both[0] / peak), math.log(both[1] / peak)))
        self.times.append(peak / bound)
        self.seen.setdefault(kind, []).append((position, peak - bound))
        self._known = {}

    def expected(self, rise: Reals | float = 1.0, at: Places = ALL) -> Reals:
        """Peak memory of candidates, bytes. rise: what refined bounds are expected to be of those that are
        not."""
        by_kind, by_times = np.square(self.misses[-LATELY:] or [(0.0, 0.0)]).sum(axis=0)
        if by_times < by_kind:
            return np.asarray(self.bound[at] * rise * median(self.times))
        share, fixed = self._of_kind(at)
        return np.asarray(self.bound[at] * (rise + share) + fixed)

    def _of_kind(self, at: Places) -> tuple[Reals, Reals]:
        """(Times its bound, bytes) that each candidate has above its bound by its kind, else by all."""
        weights = once(self._known, "weights", self._weights)

        def of(at: Places) -> Reals:
            kinds = self.kinds[at]
            fixed = np.zeros(len(kinds))
            for part, weight in zip(self.parts, weights.T, strict=False):
                fixed += part[at] * weight[kinds]
            return np.stack([weights[kinds, -1], fixed])

        share, fixed = found_at(self._known, "above", at, of)
        return share, fixed

    def _weights(self) -> Reals:
        """What each kind has for each unit of each part, and for each byte of the bound."""
        every = [one for seen in self.seen.values() for one in seen]
        scale = np.append(self._largest, self.bound.max(initial=1.0))
        weights = np.tile(self._fit(every, scale), (int(self.kinds.max(initial=0)) + 1, 1))
        for kind, seen in self.seen.items():
            weights[kind] = self._fit(seen, scale)
        return weights

    @cached_property
    def _largest(self) -> Reals:
        """Of each part."""
        return np.asarray(self.parts.max(axis=1, initial=1.0))

    def _fit(self, seen: list[tuple[int, float]], scale: Reals) -> Reals:
        """Bytes for each unit of each part and for each byte of the bound, by least squares of what they miss
        as a share of the bound; of the gathered weights near 1, of the others near 0, where too few
        simulations say. scale: the largest of each part, and of the bounds."""
        from scipy.optimize import nnls  # takes long to import, and a simulation learns nothing

        least = np.zeros(len(scale))
        least[0] = 1.0
        if not seen:
            return least
        places = [position for position, _ in seen]
        parts = np.vstack([self.parts[:, places], self.bound[places]])
        rows = (parts / self.bound[places]).T * scale[-1] / scale
        above = np.array([max(0.0, above) for _, above in seen]) / self.bound[places] * scale[-1] / _GIB
        doubt = np.diag(rows.mean(axis=0) * np.where(least > 0, _DOUBT, _DOUBT / 10))
        believed = doubt @ (least * scale / _GIB)
        found, _ = nnls(np.concatenate([rows, doubt]), np.concatenate([above, believed]))
        return np.asarray(found * _GIB / scale)


@dataclass
class Rise:
    """How many times its closed form something is: by median of a kind; of one not seen, what those seen
    `usually` are."""

    kinds: Column
    usually: Callable[[list[float]], float] = np.median
    seen: dict[int, list[float]] = field(default_factory=dict)
    _known: dict[Hashable, Any] = field(default_factory=dict)

    def learn(self, position: int, times: float) -> None:
        """Note the rise of a candidate."""
        self.seen.setdefault(int(self.kinds[position]), []).append(times)
        self._known = {}

    def expected(self, at: Places = ALL) -> Reals:
        """Of candidates."""
        each = once(self._known, "kinds", self._by_kind)
        return found_at(self._known, "all", at, lambda at: each[self.kinds[at]])

    def _by_kind(self) -> Reals:
        found = np.ones(int(self.kinds.max(initial=0)) + 1)
        if self.seen:
            found[:] = self.usually([times for seen in self.seen.values() for times in seen])
        for kind, seen in self.seen.items():
            found[kind] = np.median(seen)
        return found


@dataclass
class Effects:
    """What each value of each column adds to a logarithm: ridge regression over the candidates seen.

    codes: of each column the place of each candidate's value among that column's values, in as few bytes as
    hold it: a column has hundreds of thousands. joined: of so many columns, one after the other, the place of
    each candidate's values among all their combinations. which: places of the columns among those given.
    alike: how often two values were seen together.
    """

    codes: list[NDArray[np.unsignedinteger]]
    sizes: list[int]
    joined: list[tuple[int, Column]]
    which: list[int]
    seen: list[list[int]] = field(default_factory=list)
    alike: Reals = field(init=False)

    def __post_init__(self) -> None:
        self.starts = [sum(self.sizes[:place]) for place in range(len(self.sizes))]
        self.alike = np.zeros((sum(self.sizes), sum(self.sizes)))

    @staticmethod
    def of(columns: Iterable[Column]) -> "Effects":
        """Columns of one value say nothing and are left out."""
        codes, sizes, which = list[NDArray[np.unsignedinteger]](), list[int](), list[int]()
        for place, column in enumerate(columns):
            values, places = coded(column)
            if len(values) > 1:
                codes.append(places.astype(np.min_scalar_type(len(values))))
                sizes.append(len(values))
                which.append(place)
        return Effects(codes, sizes, _joined(codes, sizes), which)

    def unseen_yet(self) -> "Effects":
        """Of the same candidates, before any was seen."""
        return Effects(self.codes, self.sizes, self.joined, self.which)

    def see(self, position: int) -> None:
        """Note that something was seen of a candidate."""
        mine = [start + int(codes[position]) for start, codes in zip(self.starts, self.codes, strict=True)]
        self.alike[np.ix_(mine, mine)] += 1
        self.seen.append(mine)

    def of_values(self, above: Reals) -> Reals:
        """What each value adds. above: the logarithm of each that was seen, over what it is without."""
        count = len(self.alike)
        mine = np.array(self.seen, dtype=np.int64).reshape(len(above), len(self.sizes))
        sums = np.bincount(mine.ravel(), np.repeat(above, len(self.sizes)), count)
        return np.asarray(np.linalg.solve(self.alike + np.eye(count), sums))

    def unseen(self) -> Reals:
        """Of each value 1 where it was never seen, less the more often it was."""
        return np.asarray(1 / (1 + np.diagonal(self.alike)))

    def added(self, each: Reals, to: float, at: Places = ALL) -> Reals:
        """Of candidates: what their values have of `each`, added to a number."""
        found = np.full(len(self.codes[0][at]) if self.codes else 1, to)
        values = (each[start : start + size] for start, size in zip(self.starts, self.sizes, strict=True))
        for count, places in self.joined:
            sums = np.zeros(1)
            for mine in islice(values, count):
                sums = np.add.outer(sums, mine).ravel()
            if sums.any():
                found += sums[places[at]]
        return found


def _joined(codes: Sequence[NDArray[np.unsignedinteger]], sizes: Sequence[int]) -> list[tuple[int, Column]]:
    """`Effects.joined`: as many columns together as have JOINED combinations at most."""
    found: list[tuple[int, Column]] = []
    most = JOINED + 1
    for column, size in zip(codes, sizes, strict=True):
        if most * size > JOINED:
            found.append((0, np.zeros(len(column), dtype=np.int64)))
            most = 1
        (count, places), most = found[-1], most * size
        found[-1] = count + 1, places * size + column
    return found


@dataclass
class Slower:
    """How many times its closed form the step time of a candidate is, by the values of its columns: those of
    one kind of plan differ by a fifth, and a median of them hides the fast ones."""

    effects: Effects
    logarithms: list[float] = field(default_factory=list)
    _known: dict[Hashable, Any] = field(default_factory=dict)

    def learn(self, position: int, times: float) -> None:
        """Note that of a candidate."""
        self.effects.see(position)
        self.logarithms.append(math.log(times))
        self._known = {}

    def expected(self, at: Places = ALL) -> Reals:
        """Of candidates."""
        each, usual = once(self._known, "values", self._values)
        return found_at(self._known, "all", at, lambda at: np.exp(self.effects.added(each, usual, at)))

    def _values(self) -> tuple[Reals, float]:
        """(What each value adds to the logarithm, that of the usual)."""
        found, usual = np.array(self.logarithms), median(self.logarithms or [0.0])
        return self.effects.of_values(found - usual), usual


@dataclass
class Times:
    """Step times: the guess, times a factor for each value of each column (see `Effects`), optimistic where a
    value was seldom simulated."""

    guess: Reals
    effects: Effects
    seen: list[tuple[int, float]] = field(default_factory=list)
    _known: dict[Hashable, Any] = field(default_factory=dict)

    def learn(self, position: int, seconds: float) -> None:
        """Note the simulated step time of a candidate, whose guess changes no more."""
        self.effects.see(position)
        self.seen.append((position, seconds))
        self._known = {}

    def factor(self, hope: float, at: Places = ALL) -> Reals:
        """Of candidates: step time over its guess, expected. hope: by how much (as a fraction) a value that
        was never simulated is taken to be better. What is odd teaches no more than the most of the others."""
        if not self.seen:
            return np.ones(len(self.guess[at]))
        each, usual = once(self._known, ("values", hope), lambda: self._values(hope))
        return found_at(self._known, hope, at, lambda at: np.exp(self.effects.added(each, usual, at)))

    def _values(self, hope: float) -> tuple[Reals, float]:
        """(What each value adds to the logarithm, that of the usual)."""
        ratio = np.log([seconds / self.guess[position] for position, seconds in self.seen])
        usual = float(np.median(ratio))
        odd = _ODD * float(np.median(np.abs(ratio - usual))) + 1e-3
        ratio = np.clip(ratio, usual - odd, usual + odd)
        return self.effects.of_values(ratio - usual) - hope * self.effects.unseen(), usual


def codes(columns: Iterable[Column], rows: int) -> Column:
    """A code of each of so many rows, equal where these columns are."""
    found = np.zeros(rows, dtype=np.int64)
    for column in columns:
        values, places = coded(column)
        if len(values) > 1:
            found = coded(found * len(values) + places)[1]
    return found


def firsts(columns: Iterable[Column], rows: int) -> Column:
    """The first of so many rows with each combination of values of these columns, ascending."""
    combination = codes(columns, rows)
    found = np.zeros(int(combination.max(initial=-1)) + 1, dtype=np.int64)
    found[combination[::-1]] = np.arange(rows)[::-1]  # of several at one place the last one stays
    return np.sort(found)


def coded(column: Column) -> tuple[Column, Column]:
    """(the values of a column, ascending; the place of each row's among them)."""
    if not column.strides[0]:  # one value
        return column[:1], np.zeros(len(column), dtype=np.int64)
    if int(column.max()) > 1 << 20:
        values, places = np.unique(column, return_inverse=True)
        return values, places.reshape(-1).astype(np.int64)
    there = np.zeros(int(column.max()) + 1, dtype=np.bool_)
    there[column] = True
    values = np.flatnonzero(there)
    table = np.zeros(len(there), dtype=np.int64)
    table[values] = np.arange(len(values))
    return values, table[column]
