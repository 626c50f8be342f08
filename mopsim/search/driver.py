"""Search: generate -> bound -> simulate -> rank. A bound that costs a microsecond filters, the event
simulation decides."""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from msgspec.structs import replace

from mopsim.common.errors import MopError, SpecError
from mopsim.common.units import format_bytes
from mopsim.engine import SimResult, simulate
from mopsim.layers.tensors import total_params
from mopsim.search.bound import Bounds, bound
from mopsim.search.pool import Pool
from mopsim.search.space import IN_8_BITS, Axes, Problem, Space, generate
from mopsim.spec.capability import runnable
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.model import ModelSpec
from mopsim.spec.routing import worst
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import CAST, MatmulDType, Strategy
from mopsim.spec.training import TrainSpec

DEFAULT_FAMILIES = ("mop", "fsdp2", "zero_offload")
TIE = 0.005
"""Step times that differ by less (relative) are a tie, which the smaller peak memory decides."""

SLOWER = "slower, simulated: those ranked are faster, or as fast with less memory"
NOT_RUN = "mopexec does not run it"
"""The reason that one option lifts, so it is named first."""


@dataclass(frozen=True)
class Options:
    """top: how many are ranked. budget: simulations at most. any_plan: also what mopexec does not run yet.

    risk: rank plans at risk (an upper bound of their memory is beyond its limit) like those that fit;
    otherwise they are ranked only where nothing else fits. any_routing: rank only what fits however unevenly
    the router chooses, up to every token of an expert-parallel group on one rank. axes: what makes of a
    family's axes those that are searched: fewer values, or more (`mopsim.search.coarse`, `mopsim.context`).
    stack: the software of all families, where it is not each one's own.
    """

    families: tuple[str, ...] = DEFAULT_FAMILIES
    top: int = 5
    budget: int = 200
    any_plan: bool = False
    risk: bool = False
    any_routing: bool = False
    precision: MatmulDType = "bfloat16"
    axes: Callable[[Problem, Axes], Axes] | None = None
    stack: Stack | None = None


@dataclass
class SearchResult:
    """What a search did. top: fitting results, fastest first (ties by memory). closest: the one that misses
    by least, where none fits. risky: fitting results at risk, left out of `top` unless nothing else fits.

    candidates: every combination of values; each is in `top` or counted once in `rejected`. bounded: those of
    them that are legal and that mopexec runs (or any, if asked for). simulated: events played.

    proven: no candidate left out can beat the last of `top`; otherwise the budget of simulations ended
    the search.
    """

    candidates: int = 0
    bounded: int = 0
    simulated: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    bound_seconds: float = 0.0
    proven: bool = True
    top: list[SimResult] = field(default_factory=list)
    closest: SimResult | None = None
    risky: list[SimResult] = field(default_factory=list)

    @property
    def best(self) -> SimResult | None:
        return self.top[0] if self.top else None

    def to_json(self) -> dict[str, object]:
        """The keys of the `search` command."""
        found = [result.to_json() for result in self.top]
        return {
            "candidates": self.candidates,
            "bounded": self.bounded,
            "simulated": self.simulated,
            "rejected": dict(self.rejected.most_common()),
            "seconds": self.seconds,
            "bound_seconds": self.bound_seconds,
            "proven": self.proven,
            "best": found[0] if found else None,
            "top": found,
            "closest": self.closest.to_json() if self.closest and not found else None,
            "verdict": self.verdict(),
        }

    def verdict(self) -> str:
        """One line: what was found, or what stops everything and by how much."""
        if self.best:
            speed = f"{self.best.tokens_per_second_per_device:,.0f} tokens/s per device"
            return f"{self.best.strategy.name}: {speed}, {self.best.verdict}"
        if self.closest:
            over, by = self.closest.over or "memory", format_bytes(self.closest.over_bytes)
            return f"nothing fits: the closest ({self.closest.strategy.name}) is {by} over, stopped by {over}"
        counted = sorted(self.rejected.items(), key=lambda item: (NOT_RUN not in item[0], -item[1]))
        reasons = "; ".join(f"{reason} ({count})" for reason, count in counted[:3])
        return f"nothing to run: {reasons or 'no candidates'}"


def search(
    model: ModelSpec,
    hardware: HardwareProfile,
    num_nodes: int,
    training: TrainSpec,
    options: Options = Options(),
    progress: Callable[[int, SimResult | None], None] | None = None,
) -> SearchResult:
    """The fastest strategies that fit. `progress(simulated, best)` is called after each simulation."""
    started = time.perf_counter()
    problem = Problem(
        model, hardware, num_nodes, training, total_params(model), options.precision, options.stack
    )
    result = SearchResult()
    pools = [
        pool for family in options.families if (pool := _pool(problem, family, options, result)) is not None
    ]
    result.bound_seconds = time.perf_counter() - started
    _simulate(pools, options, result, progress)
    result.rejected = Counter({reason: count for reason, count in result.rejected.items() if count})
    result.seconds = time.perf_counter() - started
    return result


def _pool(problem: Problem, family: str, options: Options, result: SearchResult) -> Pool | None:
    """Generate and bound a family; count what memory rules out. None where nothing is left."""
    space = generate(problem, family, options.axes)
    result.candidates += len(space) + space.rejected.total()
    result.rejected.update(space.rejected)
    if not len(space):
        return None
    if problem.precision in CAST and family not in IN_8_BITS:
        result.rejected[f"{family}: has no products in {problem.precision}"] += len(space)
        return None
    reason = None if options.any_plan else runnable(space.build(0), problem.model, stack=space.stack)
    if reason is not None:
        result.rejected[f"{NOT_RUN}: {reason} (--any plans it all the same)"] += len(space)
        return None
    bounds = bound(space)
    result.bounded += len(space)
    device, host = problem.hardware.memory_limit(), problem.hardware.host_limit()
    over = bounds.device > device
    names = list(bounds.parts)
    worst = np.argmax(np.stack(list(bounds.parts.values())), axis=0)
    for position, name in enumerate(names):
        result.rejected[f"device memory, bound: {name}"] += int((over & (worst == position)).sum())
    result.rejected["host memory, bound"] += int((~over & (bounds.host > host)).sum())
    keep = np.flatnonzero(~over & (bounds.host <= host))
    if not len(keep):
        _closest(space, bounds, result)
        return None
    return Pool.of(space, bounds, keep.astype(np.int64))


def _closest(space: Space, bounds: Bounds, result: SearchResult) -> None:
    """Simulate the candidate that misses its limits by least, to say what stops it."""
    hardware = space.problem.hardware
    miss = np.maximum(bounds.device / hardware.memory_limit(), bounds.host / max(hardware.host_limit(), 1))
    _keep_closest(_run(space, int(np.argmin(miss)), result, count=False), result)


def _keep_closest(simulated: SimResult | None, result: SearchResult) -> None:
    if simulated is not None and (result.closest is None or simulated.over_bytes < result.closest.over_bytes):
        result.closest = simulated


def _run(space: Space, index: int, result: SearchResult, *, count: bool = True) -> SimResult | None:
    """Simulate one row; None (and a reason counted, if `count`) where a rule refuses it."""
    problem = space.problem
    try:
        strategy: Strategy = space.build(index)
        strategy.check_model(problem.model)
        problem.training.check_strategy(strategy)
        simulated = simulate(
            problem.model, problem.hardware, problem.num_nodes, strategy, problem.training, space.stack
        )
    except SpecError as error:
        result.rejected[f"{error.field} {error.rule}"] += count
        return None
    except MopError as error:
        result.rejected[str(error)] += count
        return None
    result.simulated += 1
    return simulated


@dataclass
class _Hunt:
    """The simulations of a search: best guess first, and by turns a neighbour of the best found so far."""

    pools: Sequence[Pool]
    options: Options
    result: SearchResult
    best_at: tuple[int, int] | None = None
    near: list[int] = field(default_factory=list)

    def last(self) -> float:
        """Step time that a candidate must beat to be ranked."""
        top = self.result.top
        return max(one.step_time for one in top) if len(top) >= self.options.top else float("inf")

    def next(self) -> tuple[int, int] | None:
        """(pool, position) to simulate now, or None where no bound is good enough."""
        if self.best_at and self.result.simulated % 2:
            pool = self.pools[self.best_at[0]]
            while self.near:
                position = self.near.pop(0)
                if not pool.taken[position] and pool.time[position] < self.last():
                    return self.best_at[0], position
        heads = []
        for place, pool in enumerate(self.pools):
            head = pool.first(self.last())
            if head is not None:
                late, position = head
                heads.append((late, float(pool.guess[position]), place, position))
        if not heads:
            return None
        _, _, place, position = min(heads)
        return place, position

    def note(self, place: int, position: int, simulated: SimResult) -> None:
        """Learn from one simulation and rank it."""
        pool, result = self.pools[place], self.result
        if self.options.risk:
            pool.learn(position, simulated.peak_memory, simulated.host_memory)
        else:
            pool.learn(position, simulated.peak_upper, simulated.host_upper)
        if not simulated.fits:
            result.rejected[f"does not fit, simulated: {simulated.over}"] += 1
            _keep_closest(simulated, result)
            return
        if self.options.any_routing and not self._fits_any_routing(place, simulated.strategy):
            result.rejected["does not fit where the router sends all tokens to one rank"] += 1
            return
        if any(_same(simulated, one) for one in result.top):
            result.rejected["equal in time and memory to one ranked"] += 1
            return
        if simulated.verdict == "at risk" and not self.options.risk:
            result.rejected[_risk(simulated)] += 1
            result.risky = sorted([*result.risky, simulated], key=_rank)[: self.options.top]
            return
        result.rejected[SLOWER] += len(result.top) == self.options.top
        result.top = sorted([*result.top, simulated], key=_rank)[: self.options.top]
        if result.top[0] is simulated:
            self.best_at, self.near = (place, position), [int(one) for one in pool.neighbours(position)]

    def _fits_any_routing(self, place: int, strategy: Strategy) -> bool:
        space = self.pools[place].space
        problem = space.problem
        routing = worst(problem.model, strategy.experts.degree)
        training = replace(problem.training, routing=routing)
        found = simulate(problem.model, problem.hardware, problem.num_nodes, strategy, training, space.stack)
        return found.fits

    def settle(self) -> None:
        """Count what was not simulated: slower by its bound than the last of the top, or out of budget."""
        for pool in self.pools:
            left = ~pool.taken
            slower = int((left & (pool.time >= self.last())).sum())
            self.result.rejected["slower, bound: cannot beat those ranked"] += slower
            self.result.rejected["budget of simulations spent"] += int(left.sum()) - slower
            self.result.proven = self.result.proven and slower == int(left.sum())


def _rank(result: SimResult) -> tuple[int, int]:
    """Fastest first; step times within TIE of each other count as equal, and then the smaller peak leads."""
    return int(math.log(result.step_time) / math.log1p(TIE)), result.peak_memory


def _risk(result: SimResult) -> str:
    return f"at risk: the upper bound of {' and '.join(result.at_risk)} memory is over (--risk ranks it)"


def _same(one: SimResult, other: SimResult) -> bool:
    return (one.step_time, one.peak_memory, one.host_memory) == (
        other.step_time,
        other.peak_memory,
        other.host_memory,
    )


def _simulate(
    pools: Sequence[Pool],
    options: Options,
    result: SearchResult,
    progress: Callable[[int, SimResult | None], None] | None,
) -> None:
    hunt = _Hunt(pools, options, result)
    while result.simulated < options.budget:
        chosen = hunt.next()
        if chosen is None:
            break
        place, position = chosen
        pools[place].taken[position] = True
        simulated = _run(pools[place].space, int(pools[place].rows[position]), result)
        if simulated is not None:
            hunt.note(place, position, simulated)
            if progress:
                progress(result.simulated, result.best)
    hunt.settle()
    if not result.top:
        result.top = result.risky
        result.rejected.subtract(_risk(one) for one in result.top)
