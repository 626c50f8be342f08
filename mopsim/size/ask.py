"""One question of a sizing: the fastest plan at a node count, from plans of other counts and a search."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mopsim.common.garbage import collected_later
from mopsim.common.units import plain_dollars
from mopsim.engine import SimResult
from mopsim.intervals.spread import LEVEL, SURE
from mopsim.search import Options, SearchResult, search
from mopsim.search.coarse import coarse
from mopsim.search.problem import once
from mopsim.size.carry import carried, played, slower
from mopsim.size.figures import Figures, Step, figures
from mopsim.size.points import FEW_TOKENS, Point, Request, quantile
from mopsim.spec.capability import runnable
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.tensors import checkpoint_bytes
from mopsim.spec.training import TrainSpec

ROWS = 40_000
"""To which a search multiplies out a space: ten times as many take twice as long and find nothing faster
within so few simulations."""
FAR = 1.25
"""A family whose plans all take so many times as long as the best is not searched at the counts around: from
128 to 320 nodes of H200 and MI300X that factor of a family changes by a tenth at most."""
AS_GOOD = 0.97
"""Part of what a plan made of a device elsewhere that makes the plan good enough here: no other form is
tried."""


@dataclass(frozen=True)
class Ask:
    """A node count of a machine type. plans: of other counts, tried first. simulations: of each of the
    families that is searched; 0: none is. tried: strategies that were carried here before; rate: tokens/s of
    a device that the fastest plan known here makes; fastest: the step time of the plan known here, by family.
    first: a plan is tried in its first form alone, where another fits here."""

    hardware: HardwareProfile
    num_nodes: int
    plans: tuple[SimResult, ...] = ()
    families: tuple[str, ...] = ()
    simulations: int = 0
    tried: tuple[Strategy, ...] = ()
    rate: float = 0.0
    fastest: tuple[tuple[str, float], ...] = ()
    first: bool = False


@dataclass(frozen=True)
class Answer:
    """plans: the fastest that fits of each family, fastest first, without their timelines. why: what stops
    everything where there is none. tried: strategies that were carried here. behind: families that were
    searched here and whose every plan takes more than FAR times as long as the best. surer: of all that were
    simulated the fastest that fits as surely as is aimed at, else the surest, where the first does not."""

    plans: tuple[SimResult, ...]
    simulated: int
    why: str = ""
    gap: float | None = None
    tried: tuple[Strategy, ...] = ()
    behind: tuple[str, ...] = ()
    surer: SimResult | None = None


@collected_later()
def answer(request: Request, ask: Ask) -> Answer:
    """Simulate and search, once: a sizing with another limit or price asks the same again."""
    training = request.training(ask.num_nodes * ask.hardware.devices_per_node)
    problem = request.problem(ask.hardware, ask.num_nodes, training)
    plans = tuple((plan.strategy, plan.tokens_per_second_per_device) for plan in ask.plans)
    limits = (ask.simulations, ask.rate, ask.fastest, ask.first)
    key = ("answer", plans, ask.families, ask.tried, *limits)
    return once(problem.known, key, lambda: _answer(request, ask, training))


def _answer(request: Request, ask: Ask, training: TrainSpec) -> Answer:
    fitting, tried = _carried(request, ask, training)
    simulated, why, gap = len(fitting), "no plan of another number of nodes fits here", None
    best: dict[str, SimResult] = {}
    searched: SimResult | None = None
    others: list[SimResult] = []
    behind: tuple[str, ...] = ()
    if ask.simulations:
        options = Options(ask.families, 1, ask.simulations, axes=coarse, rows=ROWS)
        found = search(request.problem(ask.hardware, ask.num_nodes, training), options)
        simulated += found.simulated
        others = found.played
        fitting += [one for one in found.best_by_family.values() if one is not None]
        why, gap, searched = _memory_reason(found), found.gap, found.best
        behind = tuple(family for family, times in found.behind.items() if times > FAR)
    for one in sorted(fitting, key=lambda one: one.step_time):
        if one.sure:
            best.setdefault(one.strategy.name, one)
    plans = tuple(_small(one) for one in best.values())
    if plans and gap is not None and searched is not None:  # it is the search's, of its own best
        gap = max(0.0, (1 + gap) * plans[0].step_time / searched.step_time - 1)
    other = _surer(plans, [*fitting, *others])
    return Answer(plans, simulated, "" if plans else why, gap, tried, behind, other and _small(other))


def _surer(plans: Sequence[SimResult], others: Iterable[SimResult]) -> SimResult | None:
    """`Answer.surer`, of `others`."""
    if not plans or plans[0].p_fits >= SURE:
        return None
    found = [one for one in others if one.fits and one.p_fits > plans[0].p_fits]
    return min(found, key=lambda one: (-min(one.p_fits, SURE), one.step_time), default=None)


def merged(before: Answer, after: Answer) -> Answer:
    """Two answers of one question: the faster plan of each family, the gap of the fastest, from the bound of
    an earlier search where it was carried; of equal ones that of a search."""
    best: dict[str, SimResult] = {}
    first, then = (before, after) if after.gap is None else (after, before)
    for one in sorted((*first.plans, *then.plans), key=lambda one: one.step_time):
        best.setdefault(one.strategy.name, one)
    plans = tuple(best.values())
    fastest = [one for one in (after, before) if one.plans and one.plans[0] is plans[0]]
    last = fastest[0] if fastest else after
    gap = last.gap
    if gap is None and before.gap is not None and plans:  # of the same count: the search's bound stays
        beaten = (1 + before.gap) * plans[0].step_time / before.plans[0].step_time - 1
        gap = beaten if beaten > 0 else None
    simulated = before.simulated + after.simulated
    surer = _surer(plans, filter(None, (before.surer, after.surer, *first.plans, *then.plans)))
    return Answer(plans, simulated, "" if plans else after.why, gap, surer=surer)


def _carried(request: Request, ask: Ask, training: TrainSpec) -> tuple[list[SimResult], tuple[Strategy, ...]]:
    """(The plans of other counts as they are here, in the forms that may be better than the first; all forms
    that were tried, also those that a bound says are slower than what is known). More stages wait as long for
    one another as with fewer microbatches, and do no less: a form with other stages is for where all that is
    known here makes less of a device than the plan did."""
    found: list[SimResult] = []
    tried: list[Strategy] = []
    problem = request.problem(ask.hardware, ask.num_nodes, training)
    for plan in ask.plans:
        best, enough = 0.0, AS_GOOD * plan.tokens_per_second_per_device
        stack = request.stack or load_stack(plan.strategy.stack, "stack")  # of each kind of devices its own
        forms = list(carried(plan.strategy, problem.world_size, training.global_batch))
        for form, strategy in enumerate(forms):
            rate = max((one.tokens_per_second_per_device for one in found if one.sure), default=ask.rate)
            if best >= enough or (form and ask.first and rate):
                break
            if _stages(strategy) != _stages(plan.strategy) and max(rate, ask.rate) >= enough:
                break
            if strategy in (*ask.tried, *tried):
                best = max(best, ask.rate)
            elif not request.runnable or runnable(strategy, request.model, training, stack) is None:
                tried.append(strategy)
                ends = form + 1 == len(forms) or ask.first
                within = _worth(ask, training, strategy, found, math.inf if ends else enough)
                if within < math.inf and slower(replace(problem), strategy, stack, within):
                    continue
                one = played(problem, strategy, stack)
                if one is not None:
                    found.append(one)
                    best = max(best, one.tokens_per_second_per_device * one.sure)
    return found, tuple(tried)


def _worth(
    ask: Ask, training: TrainSpec, strategy: Strategy, found: Sequence[SimResult], enough: float
) -> float:
    """Seconds of a step above which a strategy moves no answer: a plan of its family that is known here is
    faster, and it makes less than `enough` of a device, so that other forms are tried all the same
    (infinite for the last form). A search is held against what this answer finds alone."""
    known = () if ask.simulations else ask.fastest
    mine = (*known, *((one.strategy.name, one.step_time) for one in found if one.sure))
    times = [seconds for family, seconds in mine if family == strategy.name]
    tokens = training.seq_len * training.global_batch / strategy.world_size
    return max(min(times), tokens / enough) if times else math.inf


def _stages(strategy: Strategy) -> int:
    return strategy.pipeline.pipeline_parallel


def _small(result: SimResult) -> SimResult:
    """Without what draws a timeline: it goes from process to process."""
    return replace(result, spans=[], memory_curve=[], memory_curve_by_category={})


def judged(request: Request, ask: Ask, found: Answer) -> Point:
    """The point of an answer: its bill at every site, and whether it will do. Of the families' fastest plans
    as simulated it is the one with which the run ends first: published runs move the families' steps by
    other factors."""
    training = request.training(ask.num_nodes * ask.hardware.devices_per_node)
    if not found.plans:
        return Point(ask.hardware, ask.num_nodes, training, None, None, False, found.why)
    first = min(found.plans, key=lambda one: one.step_time * step_of(request, one).middle)
    gap = found.gap
    if gap is not None:
        gap = (1 + gap) * first.step_time / found.plans[0].step_time - 1
    point = billed(request, ask.hardware, ask.num_nodes, training, first, gap)
    if found.surer is None:
        return point
    return replace(point, surer=billed(request, ask.hardware, ask.num_nodes, training, found.surer))


def billed(
    request: Request,
    hardware: HardwareProfile,
    num_nodes: int,
    training: TrainSpec,
    best: SimResult,
    gap: float | None = None,
) -> Point:
    """The point of a simulated plan."""
    goal = request.goal
    step = step_of(request, best)
    bills = tuple(
        figures(hardware, num_nodes, step, goal, request.assumptions, request.terms, site)
        for site in request.sites
    )
    bill = min(bills, key=lambda one: float("inf") if one.cost is None else one.cost)
    in_time = goal.seconds is None or quantile(bill, request.confidence) <= goal.seconds
    affordable = goal.budget is None or (bill.outlay is not None and bill.outlay <= goal.budget)
    why = []
    if not in_time:
        why.append(_late(request, bill) + _small_batch(training, best))
    if not affordable:
        why.append("no price is known" if bill.outlay is None else f"too dear: {plain_dollars(bill.outlay)}")
    return Point(hardware, num_nodes, training, best, bill, in_time, "; ".join(why), gap, affordable, bills)


def _late(request: Request, bill: Figures) -> str:
    certain = bill.p_within(request.goal.seconds)
    if certain is not None and certain >= 0.5:
        return f"in time with {certain:.0%} only, {request.confidence:.0%} asked"
    return f"too slow: {bill.days:,.1f} days"


def step_of(request: Request, result: SimResult) -> Step:
    """What the run repeats, of a simulated step."""
    checkpoint = checkpoint_bytes(request.model, result.strategy.precision)
    room = result.host_limit - result.host.quantile(SURE)
    if "step_time_spread" in request.assumptions.given:
        return Step(result.tokens_per_second, checkpoint, room)
    low, high = (seconds / result.step_time for seconds in result.step_time_interval(LEVEL))
    return Step(result.tokens_per_second, checkpoint, room, low, high)


def _small_batch(training: TrainSpec, result: SimResult) -> str:
    """A hint where a device has so few tokens in a step that it waits for weights and gradients."""
    tokens = training.seq_len * training.global_batch // result.strategy.world_size
    if tokens >= FEW_TOKENS:
        return ""
    return f" ({tokens:,} tokens a device and step: a larger global batch is faster)"


def _memory_reason(found: SearchResult) -> str:
    """What stops a search that found nothing with room to spare."""
    if found.best:
        return f"{found.best.chance} only"
    least = found.closest
    if least:
        return f"does not fit: the closest strategy is {least.missing}, stopped by {least.over}"
    return found.verdict()
