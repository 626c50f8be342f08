"""Search: generate -> bound -> simulate -> rank, family by family. A bound that costs a microsecond filters,
the event simulation decides."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field, replace

import numpy as np

from mopsim.common.garbage import collected_later
from mopsim.common.processes import pool
from mopsim.engine import SimResult
from mopsim.search.bound import Bounds, bound
from mopsim.search.closest import find_closest
from mopsim.search.fitting import fitting, multiplied_out
from mopsim.search.had import left_out
from mopsim.search.hunt import SLOWER_BOUND, Hunt
from mopsim.search.options import Options
from mopsim.search.pool import Pool
from mopsim.search.problem import Problem
from mopsim.search.proof import prove
from mopsim.search.restricted import Spare, spares, try_restricted
from mopsim.search.result import NOT_RUN, TIE, SearchResult
from mopsim.search.simulating import RISK, SLOWER, UNSURE, chosen, keep_closest, last, ranked
from mopsim.search.space import IN_8_BITS, Space
from mopsim.search.staged import parts
from mopsim.search.ties import TIED, rows
from mopsim.search.wires import Reals
from mopsim.spec.capability import runnable
from mopsim.spec.strategy import CAST

ALL = Options()
HEADS = ("left out", "not searched")
"""How lines of `SearchResult.left_out` begin, before a colon."""
SPENT, GAVE_UP = "not tried: budget of simulations spent", "not tried: those before were no faster"
NO_GAIN = "no gain, bound: cannot beat the best by more than a tie"
NO_GAIN_IN_FAMILY = "no gain, bound: cannot beat the best of their family by more than a tie"
"""Reasons of what is neither bounded as slower than all that are ranked nor simulated."""


@collected_later()
def search(
    problem: Problem, options: Options = ALL, progress: Callable[[int, SimResult | None], None] | None = None
) -> SearchResult:
    """The fastest strategies that fit, each family searched by itself with a budget of its own.

    `progress(simulated, best)` is called after each simulation.
    """
    started = time.perf_counter()
    best: SimResult | None = None
    done: dict[str, Hunted] = {}

    def tell(found: SearchResult) -> None:
        if progress:
            simulated = sum(one.found.simulated for one in done.values() if one.found is not found)
            progress(simulated + found.simulated, _faster(best, found.best))

    for family, one in _each(problem, options, tell):
        done[family] = one
        tell(one.found)
        best = _faster(best, one.found.best)
    for family, one in done.items():
        if one.hunts:
            if best is not None:
                prove(one.hunts, best, tell)
            done[family] = _left(one.hunts)
    if best is not None and options.prove:
        every = {family: (one.found, one.spares) for family, one in done.items()}
        for family, spare in try_restricted(best, every, problem, options, tell):
            done[family] = done[family].without(spare)
    done = {family: _settled(one, options) for family, one in done.items()}
    both = SearchResult(problem.model, options.confidence)
    result = _merged([done[family] for family in options.families], options, both)
    result.best_by_family = {family: done[family].found.best for family in options.families}
    result.lacking = {
        family: done[family].found for family, best in result.best_by_family.items() if best is None
    }
    result.behind = _behind(done, result.best)
    result.seconds = time.perf_counter() - started
    return result


@dataclass(frozen=True)
class Hunted:
    """What one family found. left: lower bounds of the step times of what was not simulated, seconds;
    expected: the least that is expected of it, infinite where nothing is left. open: of `left`, what may
    beat the best of the family by more than a tie; reason: why it was not tried. spares: of what was not
    simulated, what keeps to rules that the best does not. hunts: where no plan of its own fits, to be held
    against the best of the others."""

    found: SearchResult
    left: Reals = field(default_factory=lambda: np.empty(0))
    expected: float = math.inf
    open: Reals = field(default_factory=lambda: np.empty(0))
    reason: str = GAVE_UP
    spares: Sequence[Spare] = ()
    hunts: Sequence[Hunt] = ()

    @property
    def least(self) -> float:
        """Seconds that what was not simulated takes, at least."""
        return float(self.left.min(initial=math.inf))

    def without(self, spare: Spare) -> "Hunted":
        """Where one of its spares was tried after all."""
        place = np.flatnonzero(self.left == spare.bound)[:1]
        return replace(self, left=np.delete(self.left, place))

    @property
    def moved(self) -> float:
        """How many times what is simulated the user's own runs make of a step: as of the best."""
        best = self.found.best
        return best.ranked_time / best.step_time if best else 1.0


@collected_later()
def hunted(
    problem: Problem, family: str, options: Options, tell: Callable[[SearchResult], None] = lambda found: None
) -> Hunted:
    """Search one family. tell: called with what is found after each simulation."""
    started, found = time.perf_counter(), SearchResult(problem.model, options.confidence)
    hunts = _hunts(problem, family, options, found)
    found.bound_seconds = time.perf_counter() - started
    if not hunts:
        return Hunted(found)
    for hunt in hunts:
        hunt.run(tell)
    if found.best is None:
        if options.nearest and not found.played and all(hunt.pool.taken.all() for hunt in hunts):
            for hunt in hunts:
                find_closest(hunt.pool.space, bound(hunt.pool.space), found)
        return Hunted(found, hunts=hunts)
    prove(hunts, found.best, tell)
    for hunt in hunts:
        hunt.lighten(tell, options.budget)
    some = [one for hunt in hunts for one in spares(hunt)] if options.prove else []
    return replace(_left(hunts), spares=some)


def _each(
    problem: Problem, options: Options, tell: Callable[[SearchResult], None]
) -> Iterator[tuple[str, Hunted]]:
    """Each family as it is searched, by itself or in processes side by side; the largest space first."""
    jobs = min(options.jobs, len(options.families))
    if jobs <= 1:
        for family in options.families:
            yield family, hunted(problem, family, options, tell)
        return
    with pool(jobs) as processes:
        asked = {
            processes.submit(hunted, problem, family, options): family for family in options.families[::-1]
        }
        for one in as_completed(asked):
            yield asked[one], one.result()


def _faster(one: SimResult | None, other: SimResult | None) -> SimResult | None:
    return next(iter(ranked(result for result in (one, other) if result)), None)


def _add(result: SearchResult, found: SearchResult) -> None:
    """Count in what one family did."""
    result.candidates += found.candidates
    result.bounded += found.bounded
    result.simulated += found.simulated
    result.bound_seconds += found.bound_seconds
    result.rejected.update(found.rejected)
    result.played += found.played
    keep_closest(found.closest, result)


def _merged(hunted: Sequence[Hunted], options: Options, result: SearchResult) -> SearchResult:
    """Rank what the families found together."""
    every = [one.found for one in hunted]
    for found in every:
        _add(result, found)
    result.left_out = named_lines(dict(zip(options.families, every, strict=True)))
    fit = [one for found in every for one in found.top]
    if not fit:
        fit = [one for found in every for one in found.risky]
        result.rejected.subtract(RISK if not one.sure else UNSURE for one in fit)
        for found in every:
            found.top = found.risky
    order = ranked(fit) if options.risk else chosen(fit, confidence=options.confidence)
    grouped = rows(order, options.top)
    result.top, result.free = [row.best for row in grouped], [row.freedom() for row in grouped]
    tied = sum(len(row.tied) for row in grouped)
    result.rejected[TIED] += tied
    result.rejected[SLOWER] += len(fit) - len(result.top) - tied
    held = result.best if options.risk or not result.doubt else None  # a slower plan may be sure to fit
    result.gap = _gap(min(one.least * one.moved for one in hunted), held)
    for one in hunted:
        vain = int((one.open * one.moved >= _gains(held)).sum())
        for counted in (result, one.found):
            counted.rejected.update({NO_GAIN: vain, one.reason: len(one.open) - vain})
    hoped = held.ranked_time / min(one.expected * one.moved for one in hunted) - 1 if held else 0.0
    result.expected_gap = hoped if hoped > TIE else 0.0
    for counted in (result, *every):
        counted.rejected = Counter({reason: count for reason, count in counted.rejected.items() if count})
    return result


def named_lines(every: Mapping[str, SearchResult]) -> list[str]:
    """'left out (mop, fsdp2): ...': each line of `SearchResult.left_out` once, with the families it is of."""
    families: dict[str, list[str]] = {}
    for family, found in every.items():
        for line in found.left_out:
            families.setdefault(line, []).append(family)
    return [_named(line, ", ".join(of)) for line, of in families.items()]


def _named(line: str, families: str) -> str:
    """A line with its families: behind what the colon at its beginning ends, else at the line's end."""
    head = next((one for one in HEADS if line.startswith(f"{one}:")), line)
    return f"{head} ({families}){line.removeprefix(head)}"


def _left(hunts: Sequence[Hunt]) -> Hunted:
    """What hunts did not simulate; what memory rules out of it is counted."""
    found, pools = hunts[0].found, [one for hunt in hunts for one in hunt.pools]
    short = sum(int((one.over & one.short).sum()) for one in pools)
    found.rejected["host memory, bound: with pinned blocks and the process"] += short
    found.rejected["device memory, bound: layers and loss"] += (
        sum(int(one.over.sum()) for one in pools) - short
    )
    left = np.concatenate([hunt.left() for hunt in hunts])
    return Hunted(found, left, min(hunt.expected() for hunt in hunts))


def _settled(one: Hunted, options: Options) -> Hunted:
    """Count what was not simulated and is, by its bound, slower than the last ranked, or no gain."""
    found, left = one.found, one.left
    slower, may_gain = left >= last(found, options), left * one.moved < _gains(found.best)
    found.rejected[SLOWER_BOUND] += int(slower.sum())
    found.rejected[NO_GAIN_IN_FAMILY] += int((~slower & ~may_gain).sum())
    reason = SPENT if found.simulated >= options.budget else GAVE_UP
    return replace(one, open=left[may_gain], reason=reason)


def _behind(done: Mapping[str, Hunted], best: SimResult | None) -> dict[str, float]:
    """By family that found a plan of its own: how many times as long as the best any plan of it takes."""
    found = {family: (one.found.best, one.least * one.moved) for family, one in done.items()}
    return {
        family: min(own.ranked_time, least) / best.ranked_time
        for family, (own, least) in found.items()
        if best and own
    }


def _gains(best: SimResult | None) -> float:
    """Step time, seconds, below which a plan is faster than the best by more than a tie."""
    return best.ranked_time / (1 + TIE) if best else math.inf


def _gap(least: float, best: SimResult | None) -> float | None:
    """How much faster than the best (as a fraction) any candidate of this lower bound can be at most."""
    if math.isinf(least):
        return 0.0
    return max(0.0, best.ranked_time / least - 1) if best else None


def _hunts(problem: Problem, family: str, options: Options, result: SearchResult) -> list[Hunt]:
    """Generate and bound each part of a family; count what memory rules out. Of a part of which nothing that
    was multiplied out may fit, the rest is, until something may. None where nothing is left."""
    found = parts(problem, family, options.axes, options.rows)
    every = sum(len(space) + len(rest.time) for space, rest in found)
    for space, _ in found:
        result.candidates += space.rejected.total()
        result.rejected.update(space.rejected)
    result.candidates += every
    result.left_out += left_out(problem, family)
    space = found[0][0]
    if not len(space):
        return []
    result.left_out += not_searched(problem, family)
    if problem.precision in CAST and family not in IN_8_BITS:
        result.rejected[f"{family}: has no products in {problem.precision}"] += every
        return []
    reason = runnable(space.build(0), problem.model, stack=space.stack) if problem.runnable else None
    if reason is not None:
        result.rejected[f"{NOT_RUN}: {reason}"] += every
        return []
    result.bounded += every
    hunts, over = list[Hunt](), list[tuple[Space, Bounds]]()
    for space, rest in found:
        bounds = bound(space)
        keep = fitting(bounds, space, result)
        while not len(keep) and (more := multiplied_out(rest, math.inf, options.rows, result)):
            over.append((space, bounds))
            space, bounds, keep = more
        if len(keep):
            hunts.append(Hunt(Pool.of(space, bounds, keep), options, result, rest))
        else:
            over.append((space, bounds))
    for hunt in hunts[:-1]:
        hunt.last_part = False
    for space, bounds in over if options.nearest and not hunts else ():
        find_closest(space, bounds, result)
    return hunts


def not_searched(problem: Problem, family: str) -> list[str]:
    """A line of what plans of the family may have and no axis is of (adr/0096): few of them are simulated, no
    bound is of the others, and a proof is not either."""
    asked = problem.software(family).has.get("activations.recompute_num_layers", (1,))
    line = "not searched: most plans that recompute some layers alone (activations.recompute_num_layers)"
    return [line] * any(asked)
