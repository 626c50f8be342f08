"""Spaces too large to be multiplied out: the rows of their first axes are bounded over all values of the
minor ones, and those that promise most are multiplied by these."""

from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import cast

import numpy as np

from mopsim.search.axes import MINOR, axes_of
from mopsim.search.bound import bound
from mopsim.search.guess import guess
from mopsim.search.problem import Axes, Column, Problem
from mopsim.search.seeds import textbook
from mopsim.search.space import Space, expanded, minor_of, trunk
from mopsim.search.wires import Reals

WHOLE = 150_000
"""Rows up to which a space is multiplied out."""
SAMPLE, BATCH = 500, 100
"""Rows of a trunk that tell how many each becomes; that are multiplied out at a time."""
LEAN = 4
"""One in so many rows that are multiplied out is the leanest, not the likeliest, of those left."""

Change = Callable[[Problem, Axes], Axes]


def candidates(problem: Problem, family: str, change: Change | None = None) -> tuple[Space, Reals]:
    """(Legal candidates of a family, lower bounds of the step times of what was not multiplied out): all and
    none, where they are not too many. What cannot fit whatever the minor axes are is in `rejected`, and
    counted once there."""
    axes = axes_of(problem, family)
    axes = change(problem, axes) if change else axes
    first = trunk(problem, family, axes)
    step = max(1, len(first) // SAMPLE)
    some = first.take(np.arange(0, len(first), step))
    if len(expanded(some, axes)) * step <= WHOLE:
        return expanded(first, axes), np.zeros(0)
    return _staged(first, axes)


def _staged(first: Space, axes: Axes) -> tuple[Space, Reals]:
    time, miss = bounds_of(first, axes)
    fits = np.flatnonzero(miss <= 1)
    if not len(fits):
        fits = np.array([int(np.argmin(miss))])
    over = Counter({"memory, bound: whatever is recomputed or offloaded": len(first) - len(fits)})
    kept = _with(first.take(fits), axes, 0)
    order = _order(kept, time[fits], miss[fits], axes)
    parts: list[Space] = []
    count = done = 0
    while done < len(order) and count < WHOLE:
        parts.append(expanded(kept.take(order[done : done + BATCH]), axes))
        count, done = count + len(parts[-1]), done + BATCH
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    rejected = sum((part.rejected for part in parts), first.rejected + over)
    return Space(first.family, first.problem, columns, rejected), time[fits][order[done:]]


def bounds_of(first: Space, axes: Axes) -> tuple[Reals, Reals]:
    """(Lower bound of the step time, of memory as a share of its limit, the larger of device and host) of
    each row of a trunk, whatever the minor axes' values."""
    hardware = first.problem.hardware
    fast = [bound(_with(first, axes, corner)) for corner in range(_corners(axes))]
    time = np.minimum.reduce([one.time for one in fast])
    host = np.minimum.reduce([one.host for one in fast]) / max(hardware.host_limit(), 1)
    device = bound(_with(first, axes, None)).device / hardware.memory_limit()
    return time, np.maximum(device, host)


def _corners(axes: Axes) -> int:
    return len(_fast(axes))


def _fast(axes: Axes) -> list[dict[str, int]]:
    """Every combination of the values that bound the time from below."""
    minor = [MINOR[key] for key in minor_of(axes)]
    return [
        {
            name: value
            for axis, values in zip(minor, corner, strict=True)
            for name, value in zip(axis.columns, values, strict=True)
        }
        for corner in product(*(axis.fast for axis in minor))
    ]


def _with(first: Space, axes: Axes, corner: int | None) -> Space:
    """A trunk with the minor axes at a corner of those that bound the time, or the memory (None)."""
    if corner is not None:
        return first.having(**_fast(axes)[corner])
    minor = [MINOR[key] for key in minor_of(axes)]
    return first.having(
        **{name: value for axis in minor for name, value in zip(axis.columns, axis.lean, strict=True)}
    )


def _order(kept: Space, time: Reals, miss: Reals, axes: Axes) -> Column:
    """Rows to multiply out, first to last: seeds, then three of the best guesses and one of the leanest by
    turns."""
    likely = np.maximum(guess(kept), time)
    free = {name for key in minor_of(axes) for name in MINOR[key].columns}
    best, lean = np.argsort(likely, kind="stable"), np.argsort(miss, kind="stable")
    turns = [best[place : place + LEAN - 1] for place in range(0, len(best), LEAN - 1)]
    mixed = np.concatenate([np.append(turn, lean[place]) for place, turn in enumerate(turns)])
    every = np.concatenate([np.array(textbook(kept, likely, free), dtype=np.int64), mixed])
    _, places = np.unique(every, return_index=True)
    return cast(Column, every[np.sort(places)])
