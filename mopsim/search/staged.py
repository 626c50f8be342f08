"""Spaces too large to be multiplied out: the rows of their first axes are bounded over all values of the
minor ones, and those that promise most are multiplied by these."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import cast

import numpy as np

from mopsim.search.axes import FIRST, MINOR, Axis, within
from mopsim.search.balance import balanced
from mopsim.search.bound import Bounder
from mopsim.search.facts import SpaceFacts, surely
from mopsim.search.guess import guess, likely
from mopsim.search.had import axes_of, each, names
from mopsim.search.legal import expanded, keeping, minor_of, multiplied, trunk
from mopsim.search.options import Options
from mopsim.search.pieces import Pieces
from mopsim.search.problem import Axes, Column, Problem
from mopsim.search.refined import Refined, alike
from mopsim.search.seeds import Mask, textbook
from mopsim.search.space import Space
from mopsim.search.stages import BALANCED
from mopsim.search.wires import Reals

SAMPLE, BATCH = 500, 100
"""Rows of a trunk that tell how many each becomes; that are multiplied out at a time."""

GUESSED = ("exchange", "overlap")
"""Minor axes of which each value is guessed, and the fastest counts."""
PROMISING = 8_000
"""Rows of a trunk of which all that is GUESSED is."""
KNOWN = 600
"""Rows of a trunk whose layers are made to know what to expect of them, at some 5 ms each."""

Change = Callable[[Problem, Axes], Axes]


@dataclass
class Rest:
    """Rows of a trunk that are not multiplied out, and lower bounds of their step times, the least first.
    but: of what they are multiplied out to, rows of these values are left out."""

    trunk: Space
    axes: Axes
    time: Reals
    but: Mapping[str, int] = field(default_factory=dict)

    def under(self, below: float, most: int) -> Space | None:
        """Multiply out those whose bound is under `below` seconds, the least first, to about `most` rows;
        they are no longer of the rest. None where there are none."""
        parts, done = _multiplied(self.trunk.part(0, int(np.searchsorted(self.time, below))), self.axes, most)
        self.trunk, self.time = self.trunk.part(done, len(self.time)), self.time[done:]
        return _without(_joined(parts), self.but) if parts else None


def parts(
    problem: Problem, family: str, change: Change | None = None, most: int = Options.rows
) -> list[tuple[Space, Rest]]:
    """`candidates` of each part of a family's space that has any, in the order in which they are hunted. What
    a part leaves out is in the `rejected` of the last. change: of the axes. Columns of an axis that a caller
    made are no part's: it searched them so before."""
    own = axes_of(problem, family)
    whole = change(problem, own) if change else own
    made = {name for key in whole if key not in own for name in names(key)}
    first = {name: value for name, value in FIRST.get(family, {}).items() if name not in made}
    axes = within(whole, first)
    if not first or axes == whole:
        return [candidates(problem, family, whole, most)]
    found = [candidates(problem, family, axes, most)] if all(axes.values()) else []
    found = [(replace(space, rejected=Counter()), rest) for space, rest in found if len(space)]
    last = candidates(problem, family, whole, most, first if found else {})
    if len(last[0]) or not found:
        return [*found, last]
    found[-1][0].rejected.update(last[0].rejected)
    return found


def candidates(
    problem: Problem, family: str, axes: Axes, most: int, but: Mapping[str, int] | None = None
) -> tuple[Space, Rest]:
    """(Legal candidates of some axes of a family, what was not multiplied out): all and none, where they are
    not more than `most`. What cannot fit whatever the minor axes are is in `rejected`, and counted once
    there. but: rows of these values are left out."""
    first, but = trunk(problem, family, axes), but or {}
    step = max(1, len(first) // SAMPLE)
    some = first.take(np.arange(0, len(first), step))
    if len(multiplied(some, axes)) * step <= most:
        return _without(expanded(first, axes), but), Rest(first.part(0, 0), axes, np.zeros(0), but)
    return _staged(first, axes, most, but)


def _without(space: Space, but: Mapping[str, int]) -> Space:
    if not but:
        return space
    mine = np.logical_and.reduce([space.columns[name] == value for name, value in but.items()])
    return replace(space.take(np.flatnonzero(~mine)), rejected=space.rejected)


def _staged(first: Space, axes: Axes, most: int, but: Mapping[str, int]) -> tuple[Space, Rest]:
    time, miss = bounds_of(first, axes)
    fits = np.flatnonzero(miss <= 1)
    if not len(fits):
        fits = np.array([int(np.argmin(miss))])
    over = Counter({"memory, bound: whatever is recomputed or offloaded": len(first) - len(fits)})
    kept = _fastest(first.take(fits), axes)
    order = _order(kept, time[fits], miss[fits], axes)
    parts, done = _multiplied(kept.take(order), axes, most)
    later = order[done:]
    later = later[np.argsort(time[fits][later], kind="stable")]
    found = _without(_joined(parts), but)
    found.rejected.update(first.rejected + over)
    return found, Rest(kept.take(later), axes, time[fits][later], but)


def _multiplied(rows: Space, axes: Axes, most: int) -> tuple[list[Space], int]:
    """(The first rows of a trunk multiplied out, in batches, to about `most` rows; how many they were)."""
    parts: list[Space] = []
    count = done = 0
    while done < len(rows) and count < most:
        parts.append(multiplied(rows.part(done, min(done + BATCH, len(rows))), axes))
        laid = parts[-1].columns["layout"] != BALANCED  # of the others few stay
        count, done = count + int(laid.sum()), min(done + BATCH, len(rows))
    return parts, done


def _joined(parts: Sequence[Space]) -> Space:
    first = parts[0]
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in first.columns}
    rejected = sum((part.rejected for part in parts), Counter[str]())
    return balanced(Space(first.family, first.problem, columns, rejected))


def bounds_of(first: Space, axes: Axes) -> tuple[Reals, Reals]:
    """(Lower bound of the step time of those that may fit, of memory as a share of its limit, the larger of
    device and host) of each row of a trunk, whatever the minor axes' values. What is traded counts value by
    value: the fastest keeps the most."""
    minor = [MINOR[key] for key in minor_of(axes)]
    miss = _leanest_miss(first, axes)
    time = np.full(len(first), np.inf)
    rows = np.flatnonzero(miss <= 1)
    if len(rows):
        time[rows], miss[rows] = _of_fitting(first.take(rows), axes, minor)
    return time, miss


def may_fit(problem: Problem, family: str) -> bool:
    """Whether the device has room for some row of a family's trunk, by the lower bounds of its leanest."""
    axes = axes_of(problem, family)
    first = trunk(problem, family, axes)
    return bool(len(first) and (_leanest_miss(first, axes) <= 1).any())


def _leanest_miss(first: Space, axes: Axes) -> Reals:
    """Device memory of each row, at least, as a share of its limit, whatever the minor axes' values."""
    leanest = first.having(**_leanest(MINOR[key] for key in minor_of(axes)))
    return _device(leanest, SpaceFacts.of(leanest))


def _of_fitting(first: Space, axes: Axes, minor: Sequence[Axis]) -> tuple[Reals, Reals]:
    others = [axis for axis in minor if not axis.traded]
    fast = _combinations([(axis, axis.fast) for axis in others])
    lean = _leanest(others)
    given = facts_of(first, axes)
    time, least = np.full(len(first), np.inf), np.full(len(first), np.inf)
    for traded in _combinations([(axis, _values(axis, axes)) for axis in minor if axis.traded]):
        mine = first.having(**traded)
        rows = np.flatnonzero(_chosen(mine, minor))
        if not len(rows):
            continue
        mine = mine.take(rows)
        found = [Bounder(mine.having(**corner), given) for corner in fast]
        host = np.minimum.reduce([one.host_memory() for one in found])
        host = host / max(first.problem.hardware.host_limit(), 1)
        miss = np.maximum(_device(mine.having(**lean), given), host)
        least[rows] = np.minimum(least[rows], miss)
        seconds = np.minimum.reduce([one.time() for one in found])
        time[rows] = np.minimum(time[rows], np.where(miss <= 1, seconds, np.inf))
    return time, least


def _chosen(space: Space, minor: Sequence[Axis]) -> Mask:
    """Rows in which the values of what is traded mean something beside the trunk's."""
    names, later = (
        {name for axis in minor if axis.traded is traded for name in axis.columns} for traded in (True, False)
    )
    return keeping(space, names, later)


def facts_of(first: Space, axes: Axes) -> SpaceFacts:
    """What bounds the rows of a trunk and all that they are multiplied out to."""
    return SpaceFacts.of(_fastest(first, axes))


def _fastest(first: Space, axes: Axes) -> Space:
    """With the values of the minor axes that bound the time."""
    minor = [MINOR[key] for key in minor_of(axes)]
    return first.having(**_combinations([(axis, axis.fast) for axis in minor])[0])


def _device(space: Space, given: SpaceFacts) -> Reals:
    """Device memory of each row, at least, as a share of its limit."""
    return np.asarray(Bounder(space, given).device_memory()[0] / space.machine.memory_limit())


def _values(axis: Axis, axes: Axes) -> Sequence[tuple[int, ...]]:
    return [each(value) for value in axes[axis.key]]


def _combinations(choices: Sequence[tuple[Axis, Sequence[tuple[int, ...]]]]) -> list[dict[str, int]]:
    """Every combination of values of some axes, as columns."""
    return [
        {
            name: value
            for (axis, _), values in zip(choices, chosen, strict=True)
            for name, value in zip(axis.columns, values, strict=True)
        }
        for chosen in product(*(values for _, values in choices))
    ]


def _order(kept: Space, time: Reals, miss: Reals, axes: Axes) -> Column:
    """Rows to multiply out, first to last: seeds, then by turns two of those expected to be fastest, one of
    these of other degrees, and one of the leanest; at last what hardly fits."""
    tight = miss * surely(kept) > 1
    hoped = np.maximum(_expected(kept, tight, axes), time)
    free = {name for key in minor_of(axes) for name in MINOR[key].columns}
    best, lean = np.lexsort((hoped, tight)), np.argsort(miss, kind="stable")
    apart = _by_degrees(kept, best)
    pairs = np.concatenate([best, np.full(len(best), -1)]).reshape(-1, 2)
    turns = np.column_stack([pairs, apart, lean]).ravel()
    every = np.concatenate([np.array(textbook(kept, hoped, free), dtype=np.int64), turns[turns >= 0]])
    _, places = np.unique(every, return_index=True)
    return cast(Column, every[np.sort(places)])


def _expected(kept: Space, tight: Mask, axes: Axes) -> Reals:
    """Seconds of each row: the guess of its fastest values of what is traded, of those that leave room for
    it, and of what is GUESSED; of those that promise most, by their parts."""
    minor = [MINOR[key] for key in minor_of(axes)]
    ways = _combinations([(axis, _values(axis, axes)) for axis in minor if axis.key in GUESSED])
    found, chosen = _with_room(kept.having(**ways[0]), axes)
    first = np.argsort(found, kind="stable")[:PROMISING]
    for way in ways[1:]:
        faster = guess(chosen.take(first).having(**way))
        better = first[faster < found[first]]
        found[first] = np.minimum(found[first], faster)
        for name, value in way.items():
            chosen.columns[name][better] = value
    best = np.lexsort((found, tight))
    first = np.unique(np.concatenate([best[: KNOWN // 2], _by_degrees(kept, best)[: KNOWN // 2]]))
    rows = chosen.take(first)
    groups = alike(rows)[1]
    closer, legal = Refined.of(Pieces(rows), SpaceFacts.of(rows), groups)
    if closer is not None:
        found[first[np.concatenate([groups[at] for at in legal])]] = likely(closer)
    return np.asarray(found)


def _with_room(kept: Space, axes: Axes) -> tuple[Reals, Space]:
    """(Guess of each row with the fastest values of what is traded that leave room for it, or the leanest;
    the rows with these)."""
    minor = [MINOR[key] for key in minor_of(axes)]
    traded = [axis for axis in minor if axis.traded]
    lean, leanest = _leanest(axis for axis in minor if not axis.traded), _leanest(traded)
    given, enough = SpaceFacts.of(kept), surely(kept)
    found, chosen = np.full(len(kept), np.inf), {name: column.copy() for name, column in kept.columns.items()}
    values = _combinations([(axis, _values(axis, axes)) for axis in traded])
    for value in sorted(values, key=lambda one: one != leanest):
        mine = kept.having(**value)
        rows = np.flatnonzero(_chosen(mine, minor) | (value == leanest))
        if not len(rows):
            continue
        room = _device(mine.take(rows).having(**lean), given) * enough <= 1
        rows = rows[room | (value == leanest)]
        seconds = guess(mine.take(rows))
        better = (seconds < found[rows]) | np.isinf(found[rows])
        found[rows[better]] = seconds[better]
        for name, one in value.items():
            chosen[name][rows[better]] = one
    return found, Space(kept.family, kept.problem, chosen)


def _leanest(axes: Iterable[Axis]) -> dict[str, int]:
    """Columns of the values of some axes that bound the device memory."""
    return _combinations([(axis, (axis.lean,)) for axis in axes])[0]


def _by_degrees(kept: Space, order: Column) -> Column:
    """An order, by turns of rows of all pipeline and tensor degrees: guesses of one are wrong alike."""
    degrees = (kept.columns["pipeline"] << 20) + kept.columns["tensor"]
    apart = np.argsort(degrees[order], kind="stable")
    _, first, count = np.unique(degrees[order][apart], return_index=True, return_counts=True)
    place = np.empty(len(order), dtype=np.int64)
    place[apart] = np.arange(len(order)) - np.repeat(first, count)
    return order[np.argsort(place, kind="stable")]
