"""One row of a space simulated, and the order of results."""

import math
from collections.abc import Iterable
from operator import attrgetter

from mopsim.common.errors import MopError, SpecError
from mopsim.engine import SimResult, simulate
from mopsim.search.problem import Problem
from mopsim.search.result import TIE, SearchResult
from mopsim.search.space import Space
from mopsim.spec.line import choices
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import Strategy


def ranked(results: Iterable[SimResult], most: float = math.inf) -> list[SimResult]:
    """Fastest first; of the fastest and what is within TIE of it what keeps nothing on the host leads, then
    the plainest (`choices`), then the smaller peak; likewise of what is left. most: so many, but all that tie
    with the fastest, which must stay for the others to be held against it."""
    left, groups = sorted(results, key=lambda one: one.ranked_time), list[list[SimResult]]()
    while left and sum(map(len, groups)) < most:
        tied = [one for one in left if one.ranked_time <= (1 + TIE) * left[0].ranked_time]
        left = left[len(tied) :]
        groups.append(sorted(tied, key=_plainest_first))
    found = [one for group in groups for one in group]
    return found[: int(min(len(found), max(most, len(groups[0]))))] if found else []


def _plainest_first(one: SimResult) -> tuple[bool, int, int]:
    return one.host_memory > 0, choices(one.strategy), one.peak_memory


def chosen(results: Iterable[SimResult], most: float = math.inf, confidence: float = 0.0) -> list[SimResult]:
    """What a search would take, first: the fastest of those that are sure to fit; where none is, the
    likeliest, and of those that are as likely the fastest. most: so many. confidence: `Options.confidence`.
    """
    alike: dict[tuple[float, float], list[SimResult]] = {}
    for one in results:
        likely = math.floor(100 * min(one.p_fits, confidence)) / 100
        alike.setdefault((one.assurance, likely), []).append(one)
    found = [one for likely in sorted(alike, reverse=True) for one in ranked(alike[likely])]
    return found[: int(min(len(found), most))]


def same(one: SimResult, other: SimResult) -> bool:
    return _figures(one) == _figures(other)


_figures = attrgetter("step_time", "peak_memory", "host_memory")


def play(problem: Problem, strategy: Strategy, stack: Stack) -> SimResult:
    """A step of a strategy. Raises MopError where a rule refuses it."""
    strategy.check_model(problem.model)
    problem.training.check_strategy(strategy)
    return simulate(problem.model, problem.hardware, problem.num_nodes, strategy, problem.training, stack)


def run_row(space: Space, index: int, found: SearchResult, *, count: bool = True) -> SimResult | None:
    """Simulate one row; None (and a reason counted, if `count`) where a rule refuses it."""
    try:
        simulated = play(space.problem, space.build(index), space.stack)
    except SpecError as error:
        found.rejected[f"{error.field} {error.rule}"] += count
        return None
    except MopError as error:
        found.rejected[str(error)] += count
        return None
    found.simulated += 1
    return simulated


def keep_closest(simulated: SimResult | None, found: SearchResult) -> None:
    """Keep of two that miss their limits the one that misses by less."""
    if simulated is None:
        return
    if found.closest is None or sum(simulated.missing_bytes) < sum(found.closest.missing_bytes):
        found.closest = simulated
