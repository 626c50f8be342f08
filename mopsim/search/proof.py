"""After the hunts of a family: the bounds of what they left are refined, and what these leave open is
simulated where it is few."""

from collections.abc import Sequence

import numpy as np

from mopsim.engine import SimResult
from mopsim.search.hunt import Hunt, Progress
from mopsim.search.pool import Pool
from mopsim.search.result import TIE

PIECES, ENOUGH_PIECES = 10, 40
"""Refinements of bounds after the hunts, for each simulation of the budget, at some 8 ms: to narrow what is
left open, and where a proof is asked for and so many leave nothing rough."""
LARGE = 200_000
"""Candidates among which a refinement takes twice as long."""
PROOF_OPS = 3_000_000
"""Simulated ops, some 15 us each, that a proof may take."""


def prove(hunts: Sequence[Hunt], best: SimResult, progress: Progress) -> None:
    """Multiply out what may be faster by more than a tie than the best, of this family where it has one,
    and refine its bounds, the least of all parts first. If what this leaves is not too much to simulate,
    simulate it; of more, the slowest would still be open.

    What is not multiplied out keeps its bound: above that nothing is gained.
    """
    options, below = hunts[0].options, best.step_time / (1 + TIE)
    for hunt in hunts:
        hunt.multiply_out(below)
    pools = [pool for hunt in hunts for pool in hunt.pools]
    least = [1.0 if options.risk or not options.takes(best) else pool.enough for pool in pools]
    rests = [*(hunt.rest.time for hunt in hunts), *(pool.rest for pool in pools)]
    below = min(float(times.min(initial=below)) for times in rests)
    rough = sorted((*one, at) for at, pool in enumerate(pools) for one in pool.rough(below, least[at]))
    longer = 1 + sum(len(one.rows) for one in pools) / LARGE
    if not options.prove or len(rough) * longer > ENOUGH_PIECES * options.budget:
        rough = rough[: PIECES * options.budget]
    for at, pool in enumerate(pools):
        pool.refine(*(position for _, position, place in rough if place == at))
    for hunt in hunts:
        hunt.resume(progress)
    below = _still(hunts, below)
    if any(pool.rough(below, one) for pool, one in zip(pools, least, strict=True)):
        return
    if _few(hunts, below):
        while (found := _least(hunts, below)) is not None:
            hunt, pool, position = found
            hunt.simulate(pool, position, progress)
            below = _still(hunts, below)


def _still(hunts: Sequence[Hunt], below: float) -> float:
    """The same, or what beats by more than a tie what was found meanwhile, seconds."""
    return min([below, *(one.step_time / (1 + TIE) for one in hunts[0].found.top)])


def _few(hunts: Sequence[Hunt], below: float) -> bool:
    """Whether all candidates whose bound is under `below` seconds can be simulated with what is left of the
    family's budget."""
    open_, played = sum(hunt.open(below) for hunt in hunts), hunts[0].found.played
    ops = open_ * np.mean([one.num_events for one in played]) if played else 0.0
    return bool(hunts[0].found.simulated + open_ <= hunts[0].options.budget and ops <= PROOF_OPS)


def _least(hunts: Sequence[Hunt], below: float) -> tuple[Hunt, Pool, int] | None:
    """The hunt, the pool and the position of the least bound under `below` seconds."""
    every = [(hunt, pool, pool.least(below)) for hunt in hunts for pool in hunt.pools]
    found = [(hunt, pool, position) for hunt, pool, position in every if position is not None]
    return min(found, key=lambda one: one[1].time[one[2]], default=None)
