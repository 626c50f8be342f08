"""The candidates of a family that the bounds let through, and what simulations teach of them."""

from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from mopsim.search.bound import Bounds
from mopsim.search.guess import guess
from mopsim.search.learn import Memory, Times, coded
from mopsim.search.problem import Column
from mopsim.search.seeds import published, textbook
from mopsim.search.space import Space
from mopsim.search.wires import Reals

#: Columns that one decision sets together: neighbours differ in one group.
_TOGETHER = {
    "expert_shard": "experts",
    "expert_tensor": "experts",
    "boundary_parts": "boundary_host",
    "layout": "virtual_stages",
    "modules": "recompute",
    "bucket": "state",
    "state_parts": "state",
    "offload": "state",
    "loss_slices": "loss",
}
#: Columns that decide how large transients are beside the tokens of a rank.
_TRANSIENT = ("chunks", "ffn_slices", "loss_slices", "recompute", "modules")
MOST = 200_000
"""Candidates that a pool holds: three in four of the best guesses, one in four the leanest of the others."""
HOPE = 0.03
"""Part by which a value of a column that was never simulated is taken to be faster than known."""


@dataclass
class Pool:
    """Candidates in order of their guessed time. A position counts in that order; `rows[position]` is a
    row of the space. seeds: positions of textbook layouts, tried first; published: those of recipes,
    whatever memory they are expected to need. rest: lower bounds of the times of those beyond MOST."""

    space: Space
    rows: Column
    time: Reals
    host: Reals
    memory: Memory
    times: Times
    seeds: list[int]
    taken: NDArray[np.bool_]
    host_rise: list[float]
    rest: Reals
    published: frozenset[int] = frozenset()

    @staticmethod
    def of(space: Space, bounds: Bounds, keep: Column) -> "Pool":
        """The rows `keep` of a space; equal guesses in order of memory."""
        likely = np.maximum(guess(space.take(keep)), bounds.time[keep])
        order = np.lexsort((bounds.device[keep], likely))
        order, rest = _most(order, bounds.device[keep] + bounds.gathered[keep])
        rows, likely, beyond = keep[order], likely[order], bounds.time[keep[rest]]
        kept = space.take(rows)
        kinds = np.zeros(len(rows), dtype=np.int64)
        for name in _TRANSIENT:
            values, codes = coded(kept.columns[name])
            kinds = kinds * len(values) + codes
        each = kept.tokens() / kept.columns["tensor"].astype(np.float64)
        parts = np.stack([bounds.gathered[rows], each, bounds.parts["boundaries"][rows]])
        memory = Memory(bounds.device[rows], parts, coded(kinds)[1])
        times = Times.of(likely, list(kept.columns.values()))
        taken = np.zeros(len(rows), dtype=np.bool_)
        seeds, known = textbook(kept, likely), frozenset(published(kept, likely))
        time, host = bounds.time[rows], bounds.host[rows]
        return Pool(space, rows, time, host, memory, times, seeds, taken, [], beyond, known)

    def learn(self, position: int, peak_memory: int, host_memory: int, step_time: float) -> None:
        """Note what a simulated candidate took."""
        self.memory.learn(position, peak_memory)
        self.times.learn(position, step_time)
        if self.host[position] > 0:
            self.host_rise.append(host_memory / float(self.host[position]))

    def room(self) -> tuple[NDArray[np.bool_], Reals]:
        """Of each candidate: whether it is expected to fit; its expected share of what there is."""
        hardware = self.space.problem.hardware
        rise = median(self.host_rise) if self.host_rise else 1.0
        device = self.memory.expected() / hardware.memory_limit()
        host = self.host * rise / max(hardware.host_limit(), 1)
        share = np.maximum(device, host)
        return share <= 1, share

    def next(self, below: float, fits: NDArray[np.bool_], share: Reals) -> int | None:
        """The untaken candidate of the least expected time whose bound is under `below` seconds; where none
        is expected to fit, the leanest."""
        usable = ~self.taken & (self.time < below)
        if not usable.any():
            return None
        likely = usable & fits
        if likely.any():
            return int(np.argmin(np.where(likely, self.times.expected(HOPE), np.inf)))
        return int(np.argmin(np.where(usable, share, np.inf)))

    def bold(self, below: float, may_fit: NDArray[np.bool_]) -> int | None:
        """The untaken candidate of the least expected time, if that is under `below` seconds."""
        expected = np.where(~self.taken & may_fit, self.times.expected(HOPE), np.inf)
        position = int(np.argmin(expected))
        return position if expected[position] < below else None

    def neighbours(self, position: int) -> Column:
        """Positions one decision away from `position`, best guess first."""
        index = int(self.rows[position])
        groups: dict[str, NDArray[np.bool_]] = {}
        for name, column in self.space.columns.items():
            if not column.strides[0]:  # one value
                continue
            group = _TOGETHER.get(name, name)
            differs = column[self.rows] != column[index]
            groups[group] = groups[group] | differs if group in groups else differs
        if not groups:
            return np.zeros(0, dtype=np.int64)
        count = np.sum(np.stack(list(groups.values())), axis=0)
        return np.flatnonzero(count == 1).astype(np.int64)


def _most(order: Column, memory: Reals) -> tuple[Column, Column]:
    """(MOST places of an order, in it; the others). memory: that each place is expected to need."""
    if len(order) <= MOST:
        return order, order[:0]
    first, others = order[: MOST * 3 // 4], order[MOST * 3 // 4 :]
    lean = np.zeros(len(others), dtype=np.bool_)
    lean[np.argsort(memory[others], kind="stable")[: MOST - len(first)]] = True
    return np.concatenate([first, others[lean]]), others[~lean]
