"""How many layers a full recomputation runs again, where the others have room to keep everything: memory and
time are linear in it, so that few simulations find the least that fits (docs/adr/0096)."""

import math
from dataclasses import dataclass, field

import numpy as np
from msgspec.structs import replace

from mopsim.common.errors import MopError
from mopsim.engine import SimResult
from mopsim.search.bound import bound
from mopsim.search.had import not_played
from mopsim.search.pool import Pool
from mopsim.search.problem import Column
from mopsim.search.simulating import play
from mopsim.search.space import Space
from mopsim.search.stages import largest_chunks
from mopsim.search.wires import Reals
from mopsim.spec.capability import runnable
from mopsim.spec.capability.job import Job
from mopsim.spec.strategy import Strategy

NOTHING_AGAIN = {"recompute": 0, "modules": 0, "saved": 0, "boundary_host": 0}
"""Columns of a row that takes less time than any number of its layers again."""
PLANS = 8
"""Plans of a pool that are simulated with some layers again, at most: each a few times."""


@dataclass
class Layers:
    """Of one plan with full recomputation: what it takes with so many layers of a chunk again. most: all of
    them. taken: layers -> (bytes of the device, seconds): of all, expected or simulated, and of those
    simulated. each: bytes that a layer keeps more, and seconds that it takes less, expected."""

    strategy: Strategy
    most: int
    taken: dict[int, tuple[float, float]]
    each: tuple[float, float]
    refused: bool = False

    def of_layers(self, layers: int) -> Strategy:
        """The plan with so many layers again."""
        again = replace(self.strategy.activations, recompute_num_layers=layers)
        return replace(self.strategy, activations=again)

    def play(self, space: Space, layers: int) -> SimResult | None:
        """Simulate it; None where a rule refuses it, or mopexec does not run what it is asked to."""
        problem, strategy = space.problem, self.of_layers(layers)
        try:
            if problem.runnable and runnable(strategy, problem.model, problem.training, space.stack):
                self.refused = True
                return None
            return play(problem, strategy, space.stack)
        except MopError:
            self.refused = True
            return None

    def note(self, layers: int, needed: float, seconds: float) -> None:
        """Learn from a simulation: of two the line through both."""
        some = {one: taken for one, taken in self.taken.items() if one < self.most}
        self.taken[layers] = needed, seconds
        for one, (bytes_, took) in some.items():
            if one != layers:
                self.each = (needed - bytes_) / (one - layers), (took - seconds) / (one - layers)

    def next(self, limit: float) -> tuple[int, float] | None:
        """(Least layers again that are expected to fit in `limit` bytes, seconds expected), if these were not
        simulated: above those that did not fit, below those that did."""
        more, less = self.each
        if self.refused or more <= 0 or less <= 0:
            return None
        last = list(self.taken)[-1]
        needed, seconds = self.taken[last]
        least = max((one + 1 for one, taken in self.taken.items() if taken[0] > limit), default=1)
        layers = max(last - math.floor((limit - needed) / more), least)
        fewest = min((one for one, taken in self.taken.items() if taken[0] <= limit), default=self.most)
        return (layers, seconds - (last - layers) * less) if layers < fewest else None


@dataclass
class Kept:
    """Of the candidates of a pool with full recomputation (places): bytes that all layers keep more where
    none runs again, and the part of the time that they take less, by their bounds; most: layers of the
    largest chunk. plans: of those that were asked for."""

    pool: Pool
    places: Column
    more: Reals
    less: Reals
    most: Reals
    plans: dict[int, Layers] = field(default_factory=dict)

    @staticmethod
    def of(pool: Pool) -> "Kept":
        c = pool.space.columns
        whole = (c["recompute"][pool.rows] == 1) & (c["saved"][pool.rows] == 0) & ~pool.over
        places = np.flatnonzero(whole)
        rows = pool.space.take(pool.rows[places])
        if not len(rows) or not has_some(rows):
            none = np.zeros(0)
            return Kept(pool, places[:0], none, none, none)
        full, kept = (bound(one, pool.given) for one in (rows, rows.having(**NOTHING_AGAIN)))
        more, less = kept.device - full.device, 1 - kept.time / full.time
        return Kept(pool, places, more, less, largest_chunks(pool.space.problem.model, rows.columns))

    def seconds(self, limit: float, below: float) -> Reals:
        """Expected of each candidate with as many layers kept as there is room for; infinite where that is
        none or all, or not under `below`."""
        found = np.full(len(self.pool.rows), np.inf)
        fits, share = self.pool.room()
        left = (1 - share[self.places]) * limit
        kept = np.floor(self.most * left / np.maximum(self.more, 1.0))
        some = (self.more > 0) & (kept >= 1) & (kept < self.most) & fits[self.places]
        time = self.pool.expected()[self.places] * (1 - self.less * kept / self.most)
        found[self.places] = np.where(some & (len(self.plans) < PLANS), time, np.inf)
        for place, plan in self.plans.items():
            promised = plan.next(limit)
            found[place] = promised[1] if promised else np.inf
        return np.where(found < below, found, np.inf)

    def plan(self, place: int, limit: float) -> Layers:
        """Of the candidate at a place."""
        if place not in self.plans:
            pool, at = self.pool, int(np.searchsorted(self.places, place))
            strategy = pool.space.build(int(pool.rows[place]))
            most = strategy.pipeline.largest_chunk(pool.space.problem.model.num_hidden_layers)
            seconds = float(pool.expected()[place])
            taken = {most: (float(pool.room()[1][place]) * limit, seconds)}
            each = float(self.more[at]) / most, seconds * float(self.less[at]) / most
            self.plans[place] = Layers(strategy, most, taken, each, most < 2)
        return self.plans[place]


def has_some(rows: Space) -> bool:
    """Whether the program has some layers again, by the capability table."""
    strategy, problem = rows.build(0), rows.problem
    strategy = replace(strategy, activations=replace(strategy.activations, recompute_num_layers=1))
    job = Job(problem.model, strategy, problem.training, rows.stack, problem.hardware)
    return next(not_played(job), None) is None
