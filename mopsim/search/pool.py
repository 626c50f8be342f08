"""The candidates of a family that the bounds let through, and what simulation teaches about their memory."""

from dataclasses import dataclass, field
from statistics import median

import numpy as np
from numpy.typing import NDArray

from mopsim.search.bound import Bounds
from mopsim.search.space import Column, Space

#: Columns that one decision sets together: neighbours differ in one group.
_TOGETHER = {
    "expert_shard": "experts",
    "expert_tensor": "experts",
    "boundary_parts": "boundary_host",
    "bucket": "state",
    "offload": "state",
    "loss_slices": "loss",
}
#: Columns that decide how large transients are beside the tokens of a rank.
_TRANSIENT = ("chunks", "ffn_slices", "loss_slices", "recompute")


@dataclass
class Pool:
    """Candidates in order of their guessed time. A position counts in that order; `rows[position]` is a
    row of the space."""

    space: Space
    rows: Column
    time: NDArray[np.float64]
    guess: NDArray[np.float64]
    device: NDArray[np.float64]
    host: NDArray[np.float64]
    tokens: NDArray[np.float64]
    kinds: Column
    taken: NDArray[np.bool_]
    excess: dict[int, list[float]] = field(default_factory=dict)
    host_rise: list[float] = field(default_factory=list)

    @staticmethod
    def of(space: Space, bounds: Bounds, keep: Column) -> "Pool":
        """The rows `keep` of a space; equal guesses in order of memory."""
        rows = keep[np.lexsort((bounds.device[keep], bounds.guess[keep]))]
        shapes = np.stack([space.columns[name][rows] for name in _TRANSIENT])
        _, kinds = np.unique(shapes, axis=1, return_inverse=True)
        tokens = space.tokens()[rows].astype(np.float64)
        taken = np.zeros(len(rows), dtype=np.bool_)
        return Pool(
            space,
            rows,
            bounds.time[rows],
            bounds.guess[rows],
            bounds.device[rows],
            bounds.host[rows],
            tokens,
            kinds.reshape(-1),
            taken,
        )

    def learn(self, position: int, peak_memory: int, host_memory: int) -> None:
        """Note how far above its bounds a simulated candidate's memory was: the device's per token of a rank,
        the host's as a ratio."""
        above = max(0.0, peak_memory - float(self.device[position])) / float(self.tokens[position])
        self.excess.setdefault(int(self.kinds[position]), []).append(above)
        if self.host[position] > 0:
            self.host_rise.append(host_memory / float(self.host[position]))

    def expected_memory(self, *, hopeful: bool = False) -> NDArray[np.float64]:
        """The bound, and the median excess of the simulated candidates alike in chunks (else of all; none
        if `hopeful`)."""
        if not self.excess:
            return self.device
        usual = 0.0 if hopeful else median(value for values in self.excess.values() for value in values)
        extra = np.full(int(self.kinds.max()) + 1, usual)
        for kind, values in self.excess.items():
            extra[kind] = median(values)
        return self.device + extra[self.kinds] * self.tokens

    def first(self, below: float) -> tuple[bool, int] | None:
        """(expected not to fit, position) of the untaken candidate of the best guess whose bound is
        under `below` s.

        Those expected not to fit the device or the host come last, the leanest first: a guess orders
        the work, only bounds and simulations reject.
        """
        usable = ~self.taken & (self.time < below)
        if not usable.any():
            return None
        hardware = self.space.problem.hardware
        rise = median(self.host_rise) if self.host_rise else 1.0
        safe = self.host * rise <= hardware.host_limit()
        fitting = usable & safe & (self.expected_memory() <= hardware.memory_limit())
        if fitting.any():
            return False, int(np.argmax(fitting))
        lean = np.where(usable, self.expected_memory(hopeful=True) / hardware.memory_limit(), np.inf)
        return True, int(np.argmin(np.where(safe, lean, lean + 1.0)))

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
