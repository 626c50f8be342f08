"""How many nodes: searches at a few counts, their plans carried to the others, then closing in on the limit.

A search at every count would miss here and there, and more nodes would look slower. So a count is asked with
the plans of its neighbours, which stay fast as the data-parallel degree grows. A deadline tells by arithmetic
about where its answer lies, and that count is searched; a budget does not, and every second doubling is.
"""

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from mopsim.size.ask import Answer, Ask
from mopsim.size.counts import least_nodes, node_counts
from mopsim.size.goodput import rack_nodes, whole_racks
from mopsim.size.known import AROUND, KnownSteps
from mopsim.size.points import Point, Request, Sizing, nearest_miss
from mopsim.spec.documents import own
from mopsim.spec.hardware import HardwareProfile

EVERY = 2
"""Doublings from one search to the next."""
SLOWER = 1.005
"""More nodes that are not faster by so much are no faster."""
LAG = 1.05
"""Factor by which a count may lag behind others without a search of its own."""
USUAL = 0.4
"""Part of the peak rate that plans reach, about: where a deadline is searched first."""
HOPE = 1.5
"""A limit missed by a larger factor is not looked into."""
DEEP, AGAIN, AGAIN_PAID = 2, 2, 4
"""Times as many simulations where the answer is; answers at most that are looked at so, and of a budget
alone: what it pays for hardly changes with the nodes."""
HIGHER = 3
"""Times at most that twice the answer is searched, where it becomes the answer or brings another."""
BESIDE, NEARLY = 1.1, 1.15
"""How far, as a factor, an answer may be from one that was looked at so, and other counts may be cheaper
(racks and data centres are whole); how far a much smaller cluster may be from the limits to be looked at."""
NEARLY_PAID = 1.3
"""How far, as a factor, a faster cluster may be from the budget to be looked at: what a larger one costs
changes with its plan alone."""

Rounds = Generator[list[Ask], list[Answer], None]


def by_itself(known: KnownSteps) -> Rounds:
    """Yields rounds of questions of one machine type, is sent their answers."""
    counts, _ = _counts(known.request, known.hardware)
    doubled = [count for count in counts if count & (count - 1) == 0 or count == counts[-1]]
    searched = _searched(known.request, known.hardware, doubled)
    times = DEEP if len(searched) == 1 else 1
    yield from _round(known, [known.search(count, times=times) for count in searched])
    if not any(known.answers[count].plans for count in searched):
        yield from _round(known, [known.search(counts[-1], times=DEEP)])
    others = [count for count in doubled if count not in searched]
    yield from _round(known, [known.carry(count) for count in others])
    yield from _round(known, [known.search_led(count) for count in others if not known.answers[count].plans])
    yield from _mend(known)
    yield from _close_in(known, counts)
    yield from _deepen(known, counts, searched if times == DEEP else [])
    yield from _hand_on(known)
    yield from _close_in(known, counts)


def with_plans(known: KnownSteps, asks: list[Ask]) -> Rounds:
    """The same for plans that come from elsewhere: where the answer is may change with them."""
    yield from _round(known, asks)
    yield from _close_in(known, _counts(known.request, known.hardware)[0])


def _searched(request: Request, hardware: HardwareProfile, counts: Sequence[int]) -> list[int]:
    """The counts to begin with: the first that meets the deadline at the USUAL rate, or some all over."""
    if request.goal.seconds is None:
        return sorted(counts[::-1][::EVERY])
    least = _least(request, hardware, USUAL)
    return [next((count for count in counts if count >= least), counts[-1])]


def _least(request: Request, hardware: HardwareProfile, share: float) -> int:
    """Nodes that arithmetic asks for at this part of the peak rate, and of the wall clock if it is given."""
    goal = request.goal
    assert goal.seconds is not None
    share *= request.assumptions.utilisation or 1.0
    return least_nodes(
        request.model, hardware, request.seq_len, goal.tokens, goal.seconds, share, request.precision,
        own(request.documents, request.seq_len),
    )  # fmt: skip


def _counts(request: Request, hardware: HardwareProfile) -> tuple[list[int], str]:
    """(the node counts worth asking about, why none can do): the largest alone, for what it misses by, where
    arithmetic says that none is enough."""
    most = request.most_nodes(hardware)
    counts = node_counts(most, rack_nodes(hardware))
    if request.goal.seconds is None:
        return counts, ""
    least = _least(request, hardware, 1.0)
    if least > most:
        allowed = f"{request.limit} at most are allowed"
        return counts[-1:], f"not fast enough: {least:,} nodes at the peak rate of products, {allowed}"
    return [count for count in counts if count >= least], ""


def _round(known: KnownSteps, asks: list[Ask]) -> Rounds:
    asks = [known.told(ask) for ask in asks if ask.simulations or known.new(ask)]
    if asks:
        for ask, found in zip(asks, (yield asks), strict=True):
            known.note(ask, found)


def _mend(known: KnownSteps) -> Rounds:
    """Hand plans on; search the counts that still lag."""
    yield from _hand_on(known)
    lagging = [count for count, _ in _lagging(known, LAG) if not known.searched[count]]
    yield from _round(known, [known.search_led(count) for count in lagging])


def _hand_on(known: KnownSteps) -> Rounds:
    """Ask counts that make less of a node than a larger one does, or are slower than a smaller one, with its
    plan."""
    asks = [known.carry(count, other) for count, other in _lagging(known)]
    yield from _round(known, [ask for ask in asks if known.new(ask)])


def _lagging(known: KnownSteps, by: float = SLOWER) -> list[tuple[int, int]]:
    """(count, one whose plan should be as good here), ascending; by: the factor that is let pass."""
    found = dict(_slower(known, by))
    for count in known.points:
        larger = known.least_work(count, above=True)
        if known.work(larger) * by < known.work(count):
            found[count] = larger
    return sorted(found.items())


def _slower(known: KnownSteps, by: float = 1 / SLOWER) -> list[tuple[int, int]]:
    """(count, fewer nodes that are as fast, or faster by a factor), ascending."""
    found, best, at = [], float("inf"), 0
    for count in sorted(known.points):
        bill = known.points[count].figures
        if bill is None:
            continue
        if bill.seconds > best * by:
            found.append((count, at))
        if bill.seconds < best:
            best, at = bill.seconds, count
    return found


def _close_in(known: KnownSteps, counts: Sequence[int]) -> Rounds:
    """Ask the counts between one that fails a limit and its neighbour that keeps it, and those that would
    keep the deadline with fewer nodes if a node did as much as at the best count around, all of them: the
    batch that fits a count may make a smaller one faster."""
    while True:
        between = {count for edge in _edges(known) for count in _inside(known, counts, *edge)}
        asks = [
            known.carry(count, *_hoped(known, count))
            for count in sorted({*between, *_hopeful(known, counts)})
        ]
        asks = [ask for ask in asks if known.new(ask)]
        if not asks:
            return
        yield from _round(known, asks)
        best = _best(known)
        without = [ask.num_nodes for ask in asks if not known.answers[ask.num_nodes].plans]
        smaller = [count for count in without if best is None or count < best.num_nodes]
        yield from _round(known, [known.search_led(count) for count in smaller])


def _hopeful(known: KnownSteps, counts: Sequence[int]) -> list[int]:
    """Counts that would be better than the best at the work of the best count around: of a budget alone
    larger ones that keep it; else those that keep the deadline and are smaller, or fill racks better."""
    best, goal = _best(known), known.request.goal
    if goal.seconds is None:
        least = best.num_nodes if best else 0
        return [
            count for count in counts if count > least and known.points[known.least_work(count)].affordable
        ]
    hoped = {count: known.work(known.least_work(count)) for count in counts}
    most = best.num_nodes if best else math.inf
    cost = known.work(best.num_nodes) * _paid_for(known, best.num_nodes) if best else 0.0
    return [
        count
        for count, work in hoped.items()
        if work <= count * goal.seconds and (count < most or work * _paid_for(known, count) * SLOWER < cost)
    ]


def _paid_for(known: KnownSteps, count: int) -> float:
    """Nodes that are paid for, whole racks of them, for each one that works."""
    return whole_racks(known.hardware, count) / count


def _hoped(known: KnownSteps, count: int) -> tuple[int, ...]:
    other = known.least_work(count)
    return (other,) if other != count and known.answers[other].plans else ()


def _edges(known: KnownSteps) -> Iterator[tuple[int, int]]:
    """Neighbouring counts of which one keeps the deadline, or the budget, and the other does not."""
    for low, high in pairwise(sorted(known.points)):
        one, other = known.points[low], known.points[high]
        if one.in_time != other.in_time or (one.figures and _paid(known, one) != _paid(known, other)):
            yield low, high


def _paid(known: KnownSteps, point: Point) -> bool:
    """Whether a point keeps the budget, and the limit within which the fastest is wanted."""
    return point.affordable and known.request.pays(point.figures)


def _inside(known: KnownSteps, counts: Sequence[int], low: int, high: int) -> list[int]:
    return [count for count in counts if low < count < high and count not in known.points]


def _deepen(known: KnownSteps, counts: Sequence[int], searched: Sequence[int]) -> Rounds:
    """A longer search of the leading families at the answer, or at a much smaller cluster that all but does.
    A faster plan goes to the counts around it, and the answer may then be another, so again. searched: counts
    that were searched as long."""
    done, paid = list(searched), known.request.goal.seconds is None
    while len(done) < (AGAIN_PAID if paid else AGAIN) + len(searched):
        best = _best(known) or _almost(known)
        better = _larger(known, best, done) if paid else _smaller(known, best)
        order = (best, better) if paid and len(done) % 2 else (better, best)
        ahead = [one for one in order if one and not _beside(one, done)]
        if not ahead:
            break
        yield from _look(known, ahead[0].num_nodes, counts)
        done.append(ahead[0].num_nodes)
    for _ in range(HIGHER):
        best = _best(known)
        if best is None:
            break
        yield from _look_above(known, best.num_nodes, counts)
        found = _best(known)
        if found is best or found is None:
            break
        if not _beside(found, done):
            yield from _look(known, found.num_nodes, counts)
            done.append(found.num_nodes)


def _look_above(known: KnownSteps, best: int, counts: Sequence[int]) -> Rounds:
    """Searches of the hopeful families at all nodes of the best's racks, which are paid for, and at twice the
    best count, which may be cheaper, and what they found at the counts around; the plan of the best at those
    just above."""
    paid = whole_racks(known.hardware, best)
    double = next((count for count in counts if count >= 2 * best), None)
    for count in (paid if paid > best and paid in counts else None, double):
        if count is not None and known.unsearched(count):
            yield from _round(known, [known.search(count)])
            yield from _round(known, _worse(known, count, counts))
            yield from _close_in(known, counts)
    above = [count for count in counts if best < count < BESIDE * best and count not in known.points]
    yield from _round(known, [known.carry(count) for count in above])


def _beside(point: Point, counts: Iterable[int]) -> bool:
    return any(max(point.num_nodes / one, one / point.num_nodes) < BESIDE for one in counts)


def looked_into(known: KnownSteps, count: int, times: int) -> Rounds:
    """A search at a count with so many times the simulations, and what it found at the counts around."""
    yield from _look(known, count, _counts(known.request, known.hardware)[0], times)


def _look(known: KnownSteps, count: int, counts: Sequence[int], times: int = DEEP) -> Rounds:
    """A longer search at a count, of its fastest families where all hopeful ones were searched, and what it
    found at the counts around."""
    first, *others = known.answers[count].plans
    near = [one for one in others if one.step_time < 1.05 * first.step_time]
    families = () if known.unsearched(count) else tuple(one.strategy.name for one in (first, *near))
    yield from _round(known, [known.search(count, families, times)])
    yield from _round(known, _worse(known, count, counts))
    yield from _close_in(known, counts)


def _smaller(known: KnownSteps, best: Point | None) -> Point | None:
    """A much smaller cluster that all but does: a longer search may bring it within the limits."""
    below = [one for count, one in known.points.items() if best and count * BESIDE <= best.num_nodes]
    miss = nearest_miss(below, known.request.goal, known.request.confidence)
    return miss.point if miss and miss.over < NEARLY else None


def _larger(known: KnownSteps, best: Point | None, done: Sequence[int]) -> Point | None:
    """Of a budget alone the fastest larger cluster that all but keeps it: a longer search may bring it
    within."""
    budget, least = known.request.goal.budget, BESIDE * best.num_nodes if best else 0
    almost = [
        (one.figures.seconds, one)
        for count, one in known.points.items()
        if count >= least and one.figures and not one.affordable and not _beside(one, done)
        and (one.figures.outlay or math.inf) < NEARLY_PAID * (budget or 0.0)
    ]  # fmt: skip
    return min(almost, key=lambda one: one[0], default=(0.0, None))[1]


def _almost(known: KnownSteps) -> Point | None:
    """Where nothing does: what a longer search may still bring within the limits."""
    miss = nearest_miss(list(known.points.values()), known.request.goal, known.request.confidence)
    return miss.point if miss and miss.over < HOPE else None


def _worse(known: KnownSteps, count: int, counts: Sequence[int]) -> list[Ask]:
    """The plan of `count` at the counts around it that use a device less well, and at its two neighbours."""
    plan, place = known.answers[count].plans[:1], counts.index(count)
    beside = [one for one in counts[max(0, place - 1) : place + 2] if one not in known.points]
    rate = plan[0].tokens_per_second_per_device
    around = [
        other
        for other, found in known.answers.items()
        if count / AROUND <= other <= count * AROUND
        and (not found.plans or found.plans[0].tokens_per_second_per_device * SLOWER < rate)
    ]
    return [Ask(known.hardware, one, plan) for one in sorted({*beside, *around} - {count})]


def _best(known: KnownSteps) -> Point | None:
    """The smallest cluster that does; of a budget alone the fastest, with the fewest nodes among equals."""
    done = [known.points[count] for count in sorted(known.points) if known.points[count].does]
    if known.request.goal.seconds is not None:
        return min(done, key=lambda one: (one.figures.cost or 0.0, one.num_nodes), default=None)  # type: ignore[union-attr]
    return min(done, key=lambda one: (one.figures.seconds, one.num_nodes), default=None)  # type: ignore[union-attr]


def sizing(known: KnownSteps) -> Sizing:
    """The answer, of what is known."""
    slower = dict(_slower(known))
    tried = [_marked(known.points[count], slower.get(count)) for count in sorted(known.points)]
    best = _best(known)
    if best is not None:
        return Sizing(known.hardware, best, tried, "", known.simulated)
    miss = nearest_miss(tried, known.request.goal, known.request.confidence)
    nearest = miss.point if miss else tried[-1]
    cluster = f"{nearest.num_nodes:,} node{'s' if nearest.num_nodes > 1 else ''}"
    why = _counts(known.request, known.hardware)[1] or f"{nearest.why}, with {cluster}"
    return Sizing(known.hardware, None, tried, why, known.simulated)


def _marked(point: Point, fewer: int | None) -> Point:
    if fewer is None or point.figures is None:
        return point
    why = f"no faster than {fewer:,} nodes"
    return replace(point, why=f"{point.why}; {why}" if point.why else why)
