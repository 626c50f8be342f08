"""One row of a space simulated, and the order of results."""

import math
from collections.abc import Iterable
from operator import attrgetter

from msgspec.structs import replace

from mopsim.common.errors import MopError, SpecError
from mopsim.engine import SimResult, simulate
from mopsim.intervals.spread import SURE
from mopsim.search.build import build
from mopsim.search.options import Options
from mopsim.search.problem import Problem
from mopsim.search.result import NOT_RUN, TIE, SearchResult
from mopsim.search.space import Space
from mopsim.spec.capability import runnable
from mopsim.spec.line import choices
from mopsim.spec.routing import worst
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import Strategy

RISK = f"fits, as described, with a probability below {SURE} (--risk ranks it)"
UNSURE = "P(fits) is below --confidence"
SLOWER = "slower, simulated: ranked plans are faster, or as fast and plainer"


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
    return run(space.problem, space.family, space.row(index), space.stack, found, count=count)


def run(
    problem: Problem,
    family: str,
    row: dict[str, int],
    stack: Stack,
    found: SearchResult,
    *,
    count: bool = True,
) -> SimResult | None:
    """The same of its columns; None too where only what mopexec runs is asked for, and this is not."""
    try:
        strategy = build(family, problem, row)
        if problem.runnable:
            reason = runnable(strategy, problem.model, problem.training, stack)
            if reason is not None:
                found.rejected[f"{NOT_RUN}: {reason}"] += count
                return None
        simulated = play(problem, strategy, stack)
    except SpecError as error:
        found.rejected[f"{error.field} {error.rule}"] += count
        return None
    except MopError as error:
        found.rejected[str(error)] += count
        return None
    found.simulated += 1
    return simulated


def last(found: SearchResult, options: Options) -> float:
    """Step time that a candidate must beat to be ranked."""
    return max(one.step_time for one in found.top) if len(found.top) >= options.top else math.inf


def rank(simulated: SimResult, found: SearchResult, options: Options, problem: Problem) -> bool:
    """Rank it, or note why not; whether it was."""
    reason = _refused(simulated, found, options, problem)
    if reason is not None:
        found.rejected[reason] += 1
        return False
    before = len(found.top)
    found.top = ranked([*found.top, simulated], options.top)
    found.rejected[SLOWER] += before + 1 - len(found.top)
    return True


def _refused(one: SimResult, found: SearchResult, options: Options, problem: Problem) -> str | None:
    """Why a simulated candidate is not ranked."""
    if not one.fits:
        keep_closest(one, found)
        return f"does not fit, simulated: {one.over}"
    if options.any_routing and not _fits_any_routing(one, problem):
        return "does not fit where the router sends all tokens to one rank"
    if any(same(one, other) for other in found.top):
        return "equal in time and memory to a ranked plan"
    if not options.takes(one):
        found.risky = chosen([*found.risky, one], options.top, options.confidence)
        return UNSURE if one.sure else RISK
    return None


def _fits_any_routing(one: SimResult, problem: Problem) -> bool:
    routing = worst(problem.model, one.strategy.experts.expert_parallel)
    training = replace(problem.training, routing=routing)
    return simulate(
        problem.model, problem.hardware, problem.num_nodes, one.strategy, training, one.stack
    ).fits


def keep_closest(simulated: SimResult | None, found: SearchResult) -> None:
    """Keep of two that miss their limits the one that misses by less."""
    if simulated is None:
        return
    if found.closest is None or sum(simulated.missing_bytes) < sum(found.closest.missing_bytes):
        found.closest = simulated
