"""Candidates that may fit by their bounds, of a space and of what was not multiplied out."""

import numpy as np

from mopsim.search.bound import Bounds, bound
from mopsim.search.problem import Column
from mopsim.search.result import SearchResult
from mopsim.search.space import Space
from mopsim.search.staged import Rest


def multiplied_out(
    rest: Rest, below: float, most: int, found: SearchResult
) -> tuple[Space, Bounds, Column] | None:
    """(Candidates of a rest whose bound is under `below` seconds, to about `most`; their bounds; those that
    may fit), counted: a row of the trunk, which was counted as one candidate, is now those that it becomes.
    None where there are none."""
    before = len(rest.time)
    space = rest.under(below, most)
    if space is None:
        return None
    more = len(space) - (before - len(rest.time))
    found.candidates += more + space.rejected.total()
    found.bounded += more
    found.rejected.update(space.rejected)
    bounds = bound(space)
    return space, bounds, fitting(bounds, space, found)


def fitting(bounds: Bounds, space: Space, found: SearchResult) -> Column:
    """Rows that may fit by their bounds; the others are counted by what is the most of their memory."""
    over = bounds.device > space.machine.memory_limit()
    full = bounds.host > space.problem.hardware.host_limit()
    worst = np.argmax(np.stack(list(bounds.parts.values())), axis=0)
    for position, name in enumerate(bounds.parts):
        found.rejected[f"device memory, bound: {name}"] += int((over & (worst == position)).sum())
    found.rejected["host memory, bound"] += int((~over & full).sum())
    return np.flatnonzero(~over & ~full).astype(np.int64)
