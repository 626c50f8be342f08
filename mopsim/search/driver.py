"""Search: generate -> bound -> simulate -> rank, family by family. A bound that costs a microsecond filters,
the event simulation decides."""

import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from mopsim.engine import SimResult
from mopsim.graph.tensors import total_params
from mopsim.search.bound import Bounds, bound
from mopsim.search.hunt import RISK, SLOWER, Hunt, keep_closest, rank, run_row
from mopsim.search.options import Options
from mopsim.search.pool import Pool
from mopsim.search.problem import Problem
from mopsim.search.result import NOT_RUN, SearchResult
from mopsim.search.space import IN_8_BITS, Space
from mopsim.search.staged import candidates
from mopsim.search.ties import TIED, rows
from mopsim.spec.capability import runnable
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.model import ModelSpec
from mopsim.spec.strategy import CAST
from mopsim.spec.training import TrainSpec

ALL = Options()


def search(
    model: ModelSpec,
    hardware: HardwareProfile,
    num_nodes: int,
    training: TrainSpec,
    options: Options = ALL,
    progress: Callable[[int, SimResult | None], None] | None = None,
) -> SearchResult:
    """The fastest strategies that fit, each family searched by itself with a budget of its own.

    `progress(simulated, best)` is called after each simulation.
    """
    started = time.perf_counter()
    problem = Problem(
        model, hardware, num_nodes, training, total_params(model), options.precision, options.stack
    )
    result = SearchResult(model)
    hunts: dict[str, Hunt] = {}
    for family in options.families:
        found = SearchResult(model)
        pool = _pool(problem, family, options, found)
        if pool is None:
            _add(result, found)
        else:
            hunts[family] = Hunt(pool, options, found)
    result.bound_seconds = time.perf_counter() - started
    best = None

    def tell(found: SearchResult) -> None:
        if progress:
            progress(sum(hunt.found.simulated for hunt in hunts.values()), _faster(best, found.best))

    for hunt in hunts.values():
        hunt.run(tell)
        best = _faster(best, hunt.found.best)
    for hunt in hunts.values():
        to_beat = hunt.found.best or best
        if to_beat is not None:
            hunt.prove(to_beat, tell)
    _merge(hunts, options, result)
    result.best_by_family = {
        family: hunts[family].found.best if family in hunts else None for family in options.families
    }
    result.rejected = Counter({reason: count for reason, count in result.rejected.items() if count})
    result.seconds = time.perf_counter() - started
    return result


def _faster(one: SimResult | None, other: SimResult | None) -> SimResult | None:
    return min((result for result in (one, other) if result), key=rank, default=None)


def _add(result: SearchResult, found: SearchResult) -> None:
    """Count in what one family did."""
    result.candidates += found.candidates
    result.bounded += found.bounded
    result.simulated += found.simulated
    result.rejected.update(found.rejected)
    result.played += found.played
    keep_closest(found.closest, result)


def _merge(hunts: dict[str, Hunt], options: Options, result: SearchResult) -> None:
    """Rank what the families found together, and count what each left out."""
    for hunt in hunts.values():
        _add(result, hunt.found)
        _settle(hunt, options, result)
    ranked = [one for hunt in hunts.values() for one in hunt.found.top]
    if not ranked:
        ranked = [one for hunt in hunts.values() for one in hunt.found.risky]
        result.rejected[RISK] -= len(ranked)
        for hunt in hunts.values():
            hunt.found.top = hunt.found.risky
    found = rows(sorted(ranked, key=rank), options.top)
    result.top, result.free = [row.best for row in found], [row.freedom() for row in found]
    tied = sum(len(row.tied) for row in found)
    result.rejected[TIED] += tied
    result.rejected[SLOWER] += len(ranked) - len(result.top) - tied
    result.gap = _gap([bound for hunt in hunts.values() for bound in hunt.left()], result.best)


def _settle(hunt: Hunt, options: Options, result: SearchResult) -> None:
    """Count what was not simulated: slower by its bound than the last ranked, or beyond the budget."""
    left = hunt.left()
    slower = int((left >= hunt.last()).sum())
    spent = hunt.found.simulated >= options.budget
    reason = "not tried: budget of simulations spent" if spent else "not tried: those before were no faster"
    result.rejected["device memory, bound: of layers and loss"] += int(hunt.pool.over.sum())
    result.rejected["slower, bound: cannot beat those ranked"] += slower
    result.rejected[reason] += len(left) - slower


def _gap(left: Sequence[float], best: SimResult | None) -> float | None:
    """How much faster than the best (as a fraction) any candidate of these lower bounds can be at most."""
    if not left:
        return 0.0
    return float(max(0.0, best.step_time / min(left) - 1)) if best else None


def _pool(problem: Problem, family: str, options: Options, result: SearchResult) -> Pool | None:
    """Generate and bound a family; count what memory rules out. None where nothing is left."""
    space, beyond = candidates(problem, family, options.axes)
    every = len(space) + len(beyond)
    result.candidates += every + space.rejected.total()
    result.rejected.update(space.rejected)
    if not len(space):
        return None
    if problem.precision in CAST and family not in IN_8_BITS:
        result.rejected[f"{family}: has no products in {problem.precision}"] += every
        return None
    reason = runnable(space.build(0), problem.model, stack=space.stack) if options.runnable else None
    if reason is not None:
        result.rejected[f"{NOT_RUN}: {reason}"] += every
        return None
    bounds = bound(space)
    result.bounded += every
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
    pool = Pool.of(space, bounds, keep.astype(np.int64))
    pool.rest = np.concatenate([pool.rest, beyond])
    return pool


def _closest(space: Space, bounds: Bounds, result: SearchResult) -> None:
    """Simulate the candidate that misses its limits by least, to say what stops it."""
    hardware = space.problem.hardware
    miss = np.maximum(bounds.device / hardware.memory_limit(), bounds.host / max(hardware.host_limit(), 1))
    keep_closest(run_row(space, int(np.argmin(miss)), result, count=False), result)
