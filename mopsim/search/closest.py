"""Where nothing of a space fits: its nearest miss, to say what stops it."""

import numpy as np

from mopsim.search.bound import Bounds
from mopsim.search.pool import Pool
from mopsim.search.result import SearchResult
from mopsim.search.simulating import keep_closest, run_row
from mopsim.search.space import Space
from mopsim.search.wires import Reals

REFINED = 100
"""Turns of refinements (mopsim.search.pool) before the least known is taken."""
NEAREST = 8
"""Candidates of the least that are simulated: what is refined is a bound still."""
REFUSED = 20
"""Candidates that a rule may refuse before none is told."""


def find_closest(space: Space, bounds: Bounds, found: SearchResult) -> None:
    """Simulate those that may miss their limits by the fewest bytes. Closed forms leave out what a layer and
    the loss hold for a while, by which alone many differ: so bounds are refined, the least first, until the
    least is one of those."""
    problem = space.problem
    limits = space.machine.memory_limit(), problem.hardware.host_limit()
    pool = Pool.of(space, bounds, np.arange(len(space)))
    usable = np.ones(len(pool.rows), dtype=np.bool_)

    def missing() -> Reals:
        over = (np.maximum(size - limit, 0.0) for size, limit in zip(_sizes(pool), limits, strict=True))
        return np.where(usable, sum(over), np.inf)

    told = 0
    for _ in range(REFUSED):
        position = pool.best(missing, REFINED)
        if position is None:
            return
        usable[position] = False
        row = int(pool.rows[position])
        simulated = run_row(space, row, found, count=False)
        if simulated is not None:
            keep_closest(simulated, found)
            told += 1
        if told == NEAREST:
            return


def _sizes(pool: Pool) -> tuple[Reals, Reals]:
    """Bytes of each candidate on the (device, host), at least."""
    return pool.memory.bound, pool.host
