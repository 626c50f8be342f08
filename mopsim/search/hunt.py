"""The simulations of one family: which candidate comes next, and what is kept of those simulated."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mopsim.engine import SimResult
from mopsim.intervals.spread import SURE
from mopsim.search.facts import surely
from mopsim.search.fitting import multiplied_out
from mopsim.search.kept import Kept
from mopsim.search.options import Options
from mopsim.search.pool import TURNS, Pool
from mopsim.search.result import TIE, SearchResult
from mopsim.search.simulating import last, rank, run_row
from mopsim.search.staged import Rest

PATIENCE, LEAST_PATIENCE = 0.4, 40
"""Part of the budget, and simulations at least, without a faster one after which a hunt ends."""
IDLE_OPS = 1_000_000
"""Effort without a faster one after which it ends too: simulated ops, some 15 us each, and refinements."""
SLACK = 0.05
"""Part of the memory by which what is expected is taken to be wrong at most: now and then a fast candidate is
tried that is expected to need so much too much."""
DOUBT, LATELY, EFFORT = 0.005, 8, 500_000
"""Part of a step time by which what is expected is taken to be wrong at least; simulations whose misses tell
more, of memory too; effort after which nothing slower than that is tried."""
LEEWAY = 0.05
"""Part by which a layout that is tried first may be expected to take longer than the least expected."""
TURN_OPS, THOROUGH = 2_500, 80
"""Simulated ops that take as long as a turn of refinements (mopsim.search.pool), which are as many as a
simulation is long; turns before a hunt ends."""
KEPT = 0.25
"""Part of a family's budget that a part of it leaves to the next."""
LIGHTER = 2
"""Simulations at the end of a budget that are kept for the best plan without what it has on the host."""
FEWER = 2
"""Simulations at the end of a budget that are kept for plans that run fewer layers again."""
BEAM = 3
"""The fastest simulated, whose neighbours are tried: of what does not fit, one may."""
SLOWER_BOUND = "slower, bound: cannot beat the ranked plans"

Progress = Callable[[SearchResult], None]


@dataclass
class Hunt:
    """One part of a family, alone: what other families find moves nothing here, so that more families are
    never worse.

    First the textbook layouts, then by turns a neighbour of the fastest so far and the candidate of the least
    expected time. found: of this family alone. rest: what was not multiplied out; pools: what the hunt and
    the proof chose from. near: neighbours of the BEAM fastest, and of those that were. idle: simulations
    since a faster one; spent: effort before it; before: simulations of parts before, and how many
    were played. last_part: whether no part of the family comes after this. misses: logarithms by which
    simulated (step times, peaks) were not as expected. places: where simulated ones were in a pool.
    """

    pool: Pool
    options: Options
    found: SearchResult
    rest: Rest
    near: NDArray[np.bool_] = field(init=False)
    idle: int = 0
    spent: float = 0.0
    before: tuple[int, int] = (0, 0)
    last_part: bool = True
    misses: list[tuple[float, float]] = field(default_factory=list)
    places: list[tuple[SimResult, Pool, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pools = [self.pool]
        self.near = np.zeros_like(self.pool.taken)
        confidence = self.pool.confidence = self.options.confidence
        self.pool.enough = 1.0 if self.options.risk else surely(self.pool.space, confidence=confidence)

    def run(self, progress: Progress) -> None:
        """Simulate until nothing is left, the budget is spent, or nothing faster came for long."""
        self.before = (self.found.simulated, len(self.found.played))
        budget = self.options.budget
        most = budget if self.last_part else max(1, budget - math.ceil(KEPT * budget))
        patience = max(LEAST_PATIENCE, round(PATIENCE * budget))
        while (
            self.found.simulated < most
            and self.idle < patience
            and not (self.found.top and self._effort() > self.spent + IDLE_OPS)
        ):
            left = most - self.found.simulated
            if left <= FEWER and self._keep_more(progress):
                continue
            if left <= LIGHTER and self._lighten(progress):
                continue
            position = self.next()
            if position is None:
                break
            self.simulate(self.pool, position, progress)
        self.lighten(progress, most)

    def lighten(self, progress: Progress, most: int) -> None:
        """Simulate plans that run fewer layers again, and the best without what it keeps on the host, which
        leads where it ties, up to so many of the family."""
        while self.found.simulated < most and (self._keep_more(progress) or self._lighten(progress)):
            pass

    def _keep_more(self, progress: Progress) -> bool:
        """Simulate the plan with some layers again that promises most; whether there was one."""
        below, limit = self._fastest() / (1 + TIE), self.pool.space.machine.memory_limit()
        if not (self.found.top and self.kept.places.size):
            return False
        place = self.pool.best(lambda: self.kept.seconds(limit, below), TURNS, briefly=True)
        plan = self.kept.plan(place, limit) if place is not None else None
        promised = plan.next(limit) if plan else None
        if plan is None or promised is None or promised[1] >= below:
            return False
        simulated = plan.play(self.pool.space, promised[0])
        if simulated is not None:
            found = self.found
            found.simulated, found.candidates, found.bounded = (
                one + 1 for one in (found.simulated, found.candidates, found.bounded)
            )
            plan.note(promised[0], self._needed(simulated)[0], simulated.step_time)
            self.found.played.append(simulated)
            self._rank(simulated)
            progress(self.found)
        return True

    @cached_property
    def kept(self) -> Kept:
        """Candidates of which some layers may run again."""
        return Kept.of(self.pool)

    def _lighten(self, progress: Progress) -> bool:
        """Simulate one of those that are expected to fit, whose bound may tie with the best; whether there
        was one."""
        best = self.found.best
        if best is None or not best.host_memory:
            return False
        pool, place = next(((pool, at) for one, pool, at in self.places if one is best), (self.pool, None))
        for position in pool.lighter(place) if place is not None else ():
            pool.refine(position)
            tie = pool.time[position] <= (1 + TIE) * best.step_time
            if tie and not pool.taken[position] and pool.one(position).fits:
                self.simulate(pool, position, progress)
                return True
        return False

    @property
    def simulated(self) -> int:
        """Simulations of this part."""
        return self.found.simulated - self.before[0]

    def resume(self, progress: Progress) -> None:
        """Simulate what the bounds that a proof refined promise, the least expected first, until LATELY of
        them were no faster."""
        self.idle = 0
        while self.found.top and self.idle < LATELY and self.found.simulated < self.options.budget:
            hoped = self._hoped()
            if hoped is None:
                break
            self.simulate(*hoped, progress)

    def _hoped(self) -> tuple[Pool, int] | None:
        """The pool and the position of the least expected time, bounds refined, that promises. Of what was
        multiplied out for the proof what promises is refined now; the proof refines the least bounds."""
        least, below, found = self._slowest(), self.last(), None
        for pool in self.pools:
            if pool is not self.pool:
                pool.next(below, hoped=least)
            expected = pool.hoped(pool.refined & (pool.time < below))
            position = int(np.argmin(expected))
            if expected[position] < least:
                least, found = float(expected[position]), (pool, position)
        return found

    def open(self, below: float) -> int:
        """Candidates whose bound is under `below` seconds and that were not simulated."""
        return sum(int((~one.taken & (one.time < below)).sum()) for one in self.pools)

    def multiply_out(self, below: float) -> None:
        """What was not multiplied out and whose bound is under `below` seconds."""
        more = multiplied_out(self.rest, below, self.options.rows, self.found)
        if more is None:
            return
        space, bounds, keep = more
        fast = keep[bounds.time[keep] < below]
        self.found.rejected[SLOWER_BOUND] += len(keep) - len(fast)
        if len(fast):
            pool = Pool.of(space, bounds, fast)
            pool.enough, pool.confidence = self.pool.enough, self.pool.confidence
            self.pools.append(pool)

    def simulate(self, pool: Pool, position: int, progress: Progress) -> None:
        """Simulate a candidate of a pool, learn from it and rank it."""
        pool.taken[position] = True
        simulated = run_row(pool.space, int(pool.rows[position]), self.found)
        if simulated is not None:
            self.note(pool, position, simulated)
            progress(self.found)

    def last(self) -> float:
        """Step time that a candidate must beat to be ranked."""
        return last(self.found, self.options)

    def next(self) -> int | None:
        """The position to simulate now, or None where no bound, or nothing that is expected, is good
        enough."""
        pool, below = self.pool, self.last()
        seed = self._seed(below)
        if seed is not None:
            return seed
        turns = max([TURNS, *(one.num_events / TURN_OPS for one in self.found.played[-1:])])
        if self.found.top and self.simulated % 4 == 2:
            slack = min(SLACK, self._missed()[1])
            bold = pool.next(math.inf, turns, hoped=self._fastest(), slack=slack)
            if bold is not None:
                return bold
        near = self._neighbour(below) if self.simulated % 2 else None
        if near is not None:
            return near
        found = pool.next(below, turns)
        enough = self._effort() >= EFFORT
        if found is None or (enough and not self._promising(found)):
            self._know_neighbours()
            near = self._neighbour(below)
            return pool.next(below, THOROUGH, hoped=self._slowest()) if near is None else near
        return found

    def _seed(self, below: float) -> int | None:
        """The next of the layouts that are tried first, unless others are expected to be faster by far."""
        pool = self.pool
        if not pool.seeds:
            return None
        fits, _ = pool.room()  # before they are refined, with some slack
        least = pool.next(below)
        hoped = math.inf if least is None else (1 + LEEWAY) * pool.one(least).seconds
        while pool.seeds:
            position = pool.seeds.pop(0)
            may = (fits[position] or position in pool.published) and self._open(position, below)
            if may and self._promising(position) and pool.one(position).seconds < hoped:
                return position
        return None

    def _effort(self) -> float:
        """Simulated ops, and refinements in as many."""
        return sum(one.num_events for one in self.found.played[self.before[1] :]) + TURN_OPS * self.pool.turns

    def _neighbour(self, below: float) -> int | None:
        """The neighbour of the least expected time, its bounds refined, if it promises."""
        pool = self.pool
        position = pool.best(lambda: pool.hoped(self.near & (pool.time < below)), THOROUGH, briefly=True)
        return position if position is not None and self._promising(position) else None

    def _know_neighbours(self) -> None:
        """Refine the bounds of all neighbours that may be faster: a rough guess may be wrong by a tenth."""
        pool = self.pool
        open_ = self.near & ~pool.taken & ~pool.refined & (pool.time < self._fastest() / (1 + TIE))
        pool.refine(*np.flatnonzero(open_).tolist())

    def _promising(self, position: int) -> bool:
        """Whether a candidate whose bounds are refined is expected to be faster by more than a tie, or may be
        as expectations were wrong lately."""
        return self.pool.one(position).seconds < self._slowest()

    def _slowest(self) -> float:
        """Seconds under which what is expected promises to be faster."""
        return self._fastest() * (1 + self._missed()[0]) / (1 + TIE)

    def _fastest(self) -> float:
        return min((one.step_time for one in self.found.top), default=math.inf)

    def _missed(self) -> tuple[float, float]:
        """Parts by which step times and memory are not as expected: root mean squares of those simulated
        lately."""
        lately = np.array(self.misses[-LATELY:] or [(DOUBT, DOUBT)])
        times, memory = np.maximum(np.sqrt((lately**2).mean(axis=0)), DOUBT)
        return float(times), float(memory)

    def _open(self, position: int, below: float) -> bool:
        """Whether a candidate's bounds, refined, leave it to be simulated."""
        pool = self.pool
        if not pool.taken[position] and pool.time[position] < below:
            pool.refine(position)
        return bool(not pool.taken[position] and pool.time[position] < below)

    def note(self, pool: Pool, position: int, simulated: SimResult) -> None:
        """Learn from one simulation and rank it."""
        found = self.found
        self.idle += bool(found.top)
        found.played.append(simulated)
        self.places.append((simulated, pool, position))
        memory = self._needed(simulated)
        limit = pool.space.machine.memory_limit()
        time, _, share = pool.one(position)
        self.misses.append((math.log(simulated.step_time / time), math.log(memory[0] / limit / share)))
        pool.learn(position, *memory, simulated.step_time)
        if simulated.step_time <= sorted(one.step_time for one in found.played)[:BEAM][-1]:
            self.near[pool.neighbours(position)] = True
        self._rank(simulated)

    def _needed(self, simulated: SimResult) -> tuple[int, int]:
        """Bytes of device and host that a simulated plan needs to be taken."""
        if self.options.risk:
            return simulated.peak_memory, simulated.host_memory
        device = simulated.device.enough(self.options.confidence)
        return round(device), round(simulated.host.quantile(SURE))

    def _rank(self, simulated: SimResult) -> None:
        """Rank it, or note why not."""
        fastest = self._fastest()
        taken = rank(simulated, self.found, self.options, self.pool.space.problem)
        if taken and simulated.step_time < fastest:
            self.idle, self.spent = 0, self._effort()

    def expected(self) -> float:
        """The least step time that is expected of candidates that were not simulated and may fit, seconds;
        infinite where there are none."""
        position = self.pool.next(math.inf)
        least = None if position is None else self.pool.one(position)
        return least.seconds if least and least.fits else math.inf

    def fastest(self, may: NDArray[np.bool_]) -> int | None:
        """Of the candidates that `may` and are expected to fit the one of the least expected time."""
        return self.pool.best(lambda: self.pool.hoped(may), TURNS)

    def left(self) -> np.ndarray:
        """Lower bounds of the step time of the candidates that were not simulated."""
        pools = [part for one in self.pools for part in (one.time[~one.taken], one.rest)]
        return np.concatenate([*pools, self.rest.time])
