"""Why a search's answer is what it is: what bounds the step, what each restriction costs, what would change
the answer, and the nearest rivals of other families."""

from collections.abc import Iterator, Sequence
from typing import Any

from msgspec.structs import replace

from mopsim.common.errors import MopError
from mopsim.common.io import convert, to_plain
from mopsim.common.units import format_bytes, format_probability, format_seconds
from mopsim.engine import SimResult, simulate
from mopsim.intervals.spread import SURE
from mopsim.search.had import offered
from mopsim.search.problem import Problem
from mopsim.search.restricted import RESTRICTIONS, RUN
from mopsim.search.result import TIE, SearchResult, surer
from mopsim.spec.categories import STEP_PARTS, WAITING
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.line import waits_for
from mopsim.spec.stacks import graphed

SOME, MUCH, HALF = 0.02, 0.15, 0.5
"""Shares of a step: waiting is told from the first, what a change makes longer from the second, and from the
third waiting is said to bound the step."""
TOLD = 0.75
"""Part of what is exposed that is told by what it is for, largest first."""
MORE = 2.0
"""By what factor a link's bandwidth is raised, then its latency cut, to see whether the answer changes."""
GAIN = 0.02
"""Part by which a plan must be faster for the memory that it lacks to be told."""
MOST_MORE = 0.5
"""Part of a memory that may be missing for it to be told."""
NEAR, RIVALS = 2.0, 3
"""Rivals of up to so many times the best step time, and so many of them, are played on faster links."""
NETWORK, HOST_LINK = "the network between nodes", "the link to the host"
INSIDE = "the scale-up links (NVLink or the like) between nodes"
DOMAINS = "the network between scale-up domains"
LINKS = {
    NETWORK: ("scale_out", ("peak", "bandwidth")), DOMAINS: ("scale_out", ("peak", "bandwidth")),
    INSIDE: ("scale_up", ("peak", "bandwidth")), HOST_LINK: ("host", ("link_h2d", "link_d2h")),
}  # fmt: skip
"""What may be faster: a part of the profile, and its fields at any depth."""
LATENCIES = ("latency", "latency_per_rank", "link_latency")
"""Fields of the same parts: what a transfer takes beside its bytes."""
NAMES = {
    "matmul": "matrix products",
    "attention": "attention",
    "grouped_matmul": "experts' products",
    "memory": "kernels bound by memory",
    "host": "waiting for the host",
    "network": "waiting for the network",
    "copies": "waiting for copies and the host's update",
}
"""Parts of a step, in words."""
DRAM = ("host", ("memory_bandwidth",))
"""What copies over the links to the host share."""


def why(found: SearchResult, problem: Problem) -> list[str]:
    """A line each; none where nothing fits. Plays the best of the families again on faster links."""
    best = found.best
    if best is None:
        return []
    sure = min(SURE, best.p_as_described)
    fits = [one for one in found.played if one.fits and one.p_as_described >= sure]
    others = _others(best, found)
    lines = [_bounds(best), *_costs(best, found, problem, fits), _risky(found)]
    lines += [_safer(found)]
    lines += [_memory(best, found.played, where, sure) for where in ("device", "host")]
    lines += [_faster(best, others, problem, name) for name in _links(problem)]
    lines += [_overlapped(best, others, problem), *_graphs(best, problem)]
    return [*filter(None, lines), *_rivals(best, others)]


def _bounds(best: SimResult) -> str:
    """Where the step goes, and what it waits for most."""
    step = best.step_time
    ran = {name: part for name, part in best.time_by_component.items() if name != WAITING}
    parts = sorted(ran.items(), key=lambda item: -item[1])[:3]
    spent = ", ".join(f"{name} {part / step:.0%}" for name, part in parts)
    told = waits(best)
    what = "most of it is waiting" if best.exposed_share > HALF else "most of it is compute"
    parts_of = ", ".join(f"{share:.0%} for {name}" for name, share in told)
    waited = f"in {best.exposed_share:.0%} of the step ({parts_of})" if told else "for almost nothing"
    return f"the step of {format_seconds(step)}: {spent}; {what}: compute waits {waited}"


def waits(one: SimResult) -> list[tuple[str, float]]:
    """(What compute waits for, share of the step), most first, until most of what is exposed is told; none
    where it is next to nothing."""
    if one.exposed_share < SOME:
        return []
    found: list[tuple[str, float]] = []
    shares = sorted(((part / one.step_time, name) for name, part in one.exposed.items()), reverse=True)
    for share, name in shares:
        if sum(share for _, share in found) < TOLD * one.exposed_share:
            found.append((waits_for(name, one.strategy), share))
    return found


def _costs(
    best: SimResult, found: SearchResult, problem: Problem, fits: Sequence[SimResult]
) -> Iterator[str]:
    """What rules cost that a user may have, of those that the best does not keep and that a family searched
    can keep: its space has the values of the columns that decide it."""
    for name, rule in RESTRICTIONS.items():
        possible = any(
            all(value in offered(problem, family, column) for column, value in rule.columns.items())
            for family in found.best_by_family
        )
        runs = name != RUN or any(problem.software(family).runtime for family in found.best_by_family)
        if not (possible and runs) or rule.kept(best, found.model):
            continue
        kept = [one for one in fits if rule.kept(one, found.model)]
        if not kept:
            yield f"{name}: none of the {len(fits)} simulated plans that fit keeps to this"
            continue
        fastest = min(kept, key=lambda one: one.ranked_time)
        said = f"{name}: {_slower(fastest, best)}"
        own, within = best.strategy.name, [one for one in kept if one.strategy.name == best.strategy.name]
        if fastest in within:
            yield said
        elif within:
            nearest = min(within, key=lambda one: one.ranked_time)
            yield f"{said}; of {own}, {_slower(nearest, best)}"
        else:
            yield f"{said}; no simulated plan of {own} that fits keeps to this"


def _slower(one: SimResult, best: SimResult) -> str:
    """By how much the fastest simulated plan of a kind is slower than the best, and which it is."""
    slower = one.ranked_time / best.ranked_time - 1
    cost = "no slower" if slower <= TIE else f"{slower:.0%} slower"
    another = "" if one.strategy.name == best.strategy.name else ", of another family"
    step = format_seconds(one.ranked_time)
    return f"the fastest simulated plan is {cost}{another}, {step} a step: {one.line}"


def _risky(found: SearchResult) -> str | None:
    """Why not the likeliest of the faster plans that may not fit."""
    best, one, asked = found.best, found.at_risk, found.confidence
    note = "a lower --confidence ranks it" if asked else "--risk ranks it"
    return f"the first plan is {surer(best, one, note, asked)}" if best and one else None


def _safer(found: SearchResult) -> str | None:
    """What leaves room for what the description of the first plan's program may miss."""
    best, one = found.best, found.surer
    if best is None or best.p_fits >= SURE:
        return None
    if one is None:
        return f"no simulated plan has P(fits) of {SURE:g} or more (--confidence {SURE:g} looks for one)"
    return (
        f"a plan that is {one.ranked_time / best.ranked_time - 1:.0%} slower has P(fits) "
        f"{format_probability(one.p_fits)}, though its program may keep other tensors than described "
        f"(--confidence {SURE:g} ranks such plans): {one.line} on {one.stack.name}"
    )


def _memory(best: SimResult, played: Sequence[SimResult], where: str, sure: float) -> str | None:
    """The least memory with which a faster plan, which misses nothing else, fits as surely as is asked."""
    over = []
    for one in played:
        if one.fits or one.ranked_time * (1 + GAIN) >= best.ranked_time:
            continue
        tiers = {
            "device": (one.memory_limit, one.device.as_described.quantile(sure)),
            "host": (one.host_limit, one.host.quantile(sure)),
        }
        limit, used = tiers.pop(where)
        ((other, needed),) = tiers.values()
        if 0 < used - limit <= MOST_MORE * limit and needed <= other:
            over.append((used - limit, limit, one))
    if not over:
        return None
    missing, limit, one = min(over, key=lambda each: each[0])
    gain = best.ranked_time / one.ranked_time - 1
    return (
        f"with {missing / limit:.0%} more {where} memory a rank ({format_bytes(missing)}), a plan fits, as "
        f"described, with probability {format_probability(sure)} that is {gain:.0%} faster: {one.line}"
    )


def _links(problem: Problem) -> list[str]:
    """What the job's nodes are joined by, where there are several, and the link to the host."""
    machine = problem.hardware
    domain, node = machine.scale_up_size, machine.devices_per_node
    if problem.num_nodes == 1:
        return [HOST_LINK]
    if problem.world_size <= domain:
        return [INSIDE, HOST_LINK]
    return [NETWORK if domain <= node else DOMAINS, HOST_LINK]


def _faster(best: SimResult, others: Sequence[SimResult], problem: Problem, name: str) -> str | None:
    """What the best of the families do where a link has more bandwidth, and the memory behind it where that
    is in the way, or less latency where bandwidth changes nothing; None where the profile would be refused or
    none uses the link."""
    near = [one for one in others if one.ranked_time <= NEAR * best.ranked_time][: RIVALS - 1]
    quick = faster(problem.hardware, *LINKS[name], MORE)
    if quick is None:
        return None
    if name == HOST_LINK and not any(one.host_memory for one in (best, *near)):
        return None
    plans = [best, *near]
    again = _again(problem, quick, plans)
    order = _order(again)
    said = f"with {MORE:g} times the bandwidth of {name}, the step {_takes(best, again[0])}{order}"
    both = faster(quick, *DRAM, MORE) if name == HOST_LINK else None
    if both and (more := _again(problem, both, plans))[0].ranked_time * (1 + TIE) < again[0].ranked_time:
        order += _order(more)
        so = f"with {MORE:g} times its bandwidth too the step {_takes(best, more[0])}{_order(more)}"
        said = f"{said}; the host's DRAM limits copies then, and {so}"
    elif best.ranked_time <= (1 + TIE) * again[0].ranked_time and best.exposed_share >= SOME:
        said += _sooner(best, problem, quick, LINKS[name][0])
    return said if order or not others else f"{said}; the order of the families stays"


def _sooner(best: SimResult, problem: Problem, quick: HardwareProfile, part: str) -> str:
    """What else an exchange waits for, where a link's bandwidth changes nothing: its latency, or the links
    inside a node, which go on at the same time; '' where neither makes the step shorter."""
    tried = [
        (faster(quick, part, LATENCIES, 1 / MORE),
         f"compute waits for its latency; with {1 / MORE:g} times the latency too"),
        (faster(quick, "scale_up", LINKS[INSIDE][1], MORE) if part == "scale_out" else None,
         f"exchanges wait for the links inside a node; with {MORE:g} times their bandwidth too"),
    ]  # fmt: skip
    for machine, said in tried:
        again = _again(problem, machine, [best])[0] if machine else best
        if again.ranked_time * (1 + TIE) < best.ranked_time:
            return f": {said} it {_takes(best, again)}"
    return ""


def _graphs(best: SimResult, problem: Problem) -> Iterator[str]:
    """What the same plan would do on a stack that has this one's kernels in CUDA graphs, where compute waits
    for the host."""
    if best.exposed.get("host", 0.0) < SOME * best.step_time:
        return
    for stack in graphed(best.stack):
        try:
            again = simulate(
                problem.model, problem.hardware, problem.num_nodes, best.strategy, best.training, stack
            )
        except MopError:
            continue
        of = " and ".join(stack.host.graphs)
        fits = "" if again.fits else ", which does not fit"
        yield f"with CUDA graphs of {of} (--stack {stack.name}) it {_takes(best, again)}{fits}"


def apart(best: SimResult, problem: Problem) -> SimResult | None:
    """The same plan whose exchanges of experts no other microbatch hides; None where none does."""
    if not best.strategy.overlap.experts:
        return None
    overlap = replace(best.strategy.overlap, experts=False)
    plan = replace(best.strategy, overlap=overlap)
    return simulate(problem.model, problem.hardware, problem.num_nodes, plan, best.training, best.stack)


def _overlapped(best: SimResult, others: Sequence[SimResult], problem: Problem) -> str | None:
    """What a plan owes to exchanges that another microbatch hides: published runs that do it with several
    tensor ranks saved less than is simulated (reports/validation/causes.yaml, overlap-of-tensor-ranks)."""
    again = apart(best, problem)
    if again is None:
        return None
    longer = again.ranked_time / best.ranked_time - 1
    if longer <= TIE:
        return None
    order = _order([again, *others])
    said = f"if no other microbatch hides experts' exchanges (overlap=experts) it takes {longer:.0%} longer"
    doubt = "; published runs saved less by it than is simulated where ranks split tensors: measure it"
    return f"{said}{order}{doubt if best.strategy.dense.tensor_parallel > 1 else ''}"


def _again(problem: Problem, hardware: HardwareProfile, plans: Sequence[SimResult]) -> list[SimResult]:
    """The same plans on another machine."""
    return [
        simulate(problem.model, hardware, problem.num_nodes, one.strategy, one.training, one.stack)
        for one in plans
    ]


def _takes(best: SimResult, again: SimResult) -> str:
    gain = best.ranked_time / again.ranked_time - 1
    return f"takes {format_seconds(again.ranked_time)} ({gain:.0%} faster)" if gain > TIE else "takes as long"


def _order(again: Sequence[SimResult]) -> str:
    """Which family is best now, where the first is not."""
    first = min(again, key=lambda one: one.ranked_time)
    if first.ranked_time * (1 + TIE) >= again[0].ranked_time:
        return ""
    return f", and {first.strategy.name} is best: {format_seconds(first.ranked_time)}"


def faster(
    hardware: HardwareProfile, part: str, fields: Sequence[str], factor: float
) -> HardwareProfile | None:
    """The machine with the quantities of these names, in one part of its profile, so many times as large;
    None where such a profile would be refused."""
    data = to_plain(hardware)

    def grow(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else ():
            if key in fields and isinstance(value, dict) and "value" in value:
                value["value"] *= factor
            else:
                grow(value)

    grow(data[part])
    try:
        return convert(data, HardwareProfile, "hardware")
    except MopError:
        return None


def _others(best: SimResult, found: SearchResult) -> list[SimResult]:
    """The best of the other families, fastest first."""
    others = [one for one in found.best_by_family.values() if one and one.strategy.name != best.strategy.name]
    return sorted(others, key=lambda one: one.ranked_time)


def _rivals(best: SimResult, others: Sequence[SimResult]) -> list[str]:
    """How the best of each other family compares, and what its step takes more of."""
    return [
        f"{one.strategy.name} takes {one.ranked_time / best.ranked_time:.2f} times as long as the first plan"
        f"{_more_of(one, best)}"
        for one in others
    ]


def _more_of(one: SimResult, best: SimResult) -> str:
    """Parts of the step that make most of the difference, and the stack where it is another."""
    longer = one.step_time - best.step_time
    parts = zip(STEP_PARTS, one.facts.made, best.facts.made, strict=False)
    more = {part: mine * one.step_time - its * best.step_time for part, mine, its in parts}
    most = sorted(
        ((seconds, part) for part, seconds in more.items() if seconds > MUCH * longer), reverse=True
    )
    told = " and ".join(f"{format_seconds(seconds)} more in {NAMES[part]}" for seconds, part in most[:2])
    on = f", on the stack {one.stack.name}" if one.stack.name != best.stack.name else ""
    return f"{on}: {told}" if longer > 0 and told else on
