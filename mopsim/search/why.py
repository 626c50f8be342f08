"""Why a search's answer is what it is: what bounds the step, what each restriction costs, what would change
the answer, and the nearest rivals of other families."""

from collections.abc import Iterator, Sequence
from typing import Any

from mopsim.common.errors import MopError
from mopsim.common.io import convert, to_plain
from mopsim.common.units import format_bytes, format_probability, format_seconds
from mopsim.engine import SimResult, simulate
from mopsim.intervals import SURE
from mopsim.search.had import offered
from mopsim.search.problem import Problem
from mopsim.search.restricted import RESTRICTIONS, Restriction
from mopsim.search.result import TIE, SearchResult
from mopsim.spec.categories import WAITING, WAITS
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.line import describe

SOME, MUCH = 0.02, 0.15
"""Shares of a step from which waiting for something is told, and is said to bound the step."""
MORE = 2.0
"""By what factor a link is made faster, to see whether the answer changes."""
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
DRAM = ("host", ("memory_bandwidth",))
"""What copies over the links to the host share."""


def why(found: SearchResult, problem: Problem) -> list[str]:
    """A line each; none where nothing fits. Plays the best of the families again on faster links."""
    if found.best is None:
        return []
    sure = min(SURE, found.best.p_fits)
    fits = [one for one in found.played if one.fits and one.p_fits >= sure]
    lines = [_bounds(found.best)]
    lines += [_costs(found, name, rule, fits) for name, rule in _restrictions(found, problem)]
    lines += [line for line in (_risky(found), _memory(found, "device"), _memory(found, "host")) if line]
    lines += [line for line in (_faster(found, problem, name) for name in _links(problem)) if line]
    return [*lines, *_rivals(found)]


def _bounds(best: SimResult) -> str:
    """Where the step goes, and what it waits for most."""
    step = best.step_time
    ran = {name: part for name, part in best.time_by_component.items() if name != WAITING}
    parts = sorted(ran.items(), key=lambda item: -item[1])[:3]
    spent = ", ".join(f"{name} {part / step:.0%}" for name, part in parts)
    waits = _waits(best)
    most = max(best.exposed.values(), default=0.0) / step
    what = "waiting bounds it" if most >= MUCH else "compute bounds it"
    said = ", ".join(f"{share:.0%} for {name}" for name, share in waits) or "next to nothing"
    return f"the step of {format_seconds(step)} goes to {spent}; {what}: compute waits {said}"


def _waits(one: SimResult) -> list[tuple[str, float]]:
    """(What compute waits for, share of the step), most first."""
    shares = sorted(((part / one.step_time, name) for name, part in one.exposed.items()), reverse=True)
    return [(WAITS.get(name, name.replace("_", " ")), share) for share, name in shares[:3] if share >= SOME]


def _restrictions(found: SearchResult, problem: Problem) -> Iterator[tuple[str, Restriction]]:
    """Rules that a user may have, of those that the best does not keep and that a family searched can keep:
    its space has the values of the columns that decide it."""
    best, families = found.best, found.best_by_family
    assert best is not None
    for name, one in RESTRICTIONS.items():
        possible = any(
            all(value in offered(problem, family, column) for column, value in one.columns.items())
            for family in families
        )
        if possible and not one.kept(best, found.model):
            yield name, one


def _costs(found: SearchResult, name: str, rule: Restriction, fits: Sequence[SimResult]) -> str:
    best, kept = found.best, [one for one in fits if rule.kept(one, found.model)]
    assert best is not None
    if not kept:
        return f"{name}: no such plan among the {len(fits)} simulated that fit"
    fastest = min(kept, key=lambda one: one.step_time)
    slower = fastest.step_time / best.step_time - 1
    cost = "costs nothing" if slower <= TIE else f"costs {slower:.0%} or less"
    return f"{name}: {cost}, {format_seconds(fastest.step_time)}, {describe(fastest.strategy)}"


def _risky(found: SearchResult) -> str | None:
    """The likeliest of the faster plans that may not fit."""
    best = found.best
    assert best is not None
    faster = [
        one for one in found.played
        if one.fits and one.p_fits < best.p_fits and one.step_time * (1 + GAIN) < best.step_time
    ]  # fmt: skip
    if not faster:
        return None
    one = max(faster, key=lambda one: (one.p_fits, -one.step_time))
    return (
        f"a plan that fits with probability {format_probability(one.p_fits)} (--risk ranks it) is "
        f"{best.step_time / one.step_time - 1:.0%} faster: {describe(one.strategy)}"
    )


def _memory(found: SearchResult, where: str) -> str | None:
    """The least memory that would make a faster plan fit."""
    best = found.best
    assert best is not None
    over = [
        one for one in found.played
        if not one.fits and one.step_time * (1 + GAIN) < best.step_time and _over(one, where) > 0
        and _over(one, where) <= MOST_MORE * (one.memory_limit if where == "device" else one.host_limit)
        and _over(one, "host" if where == "device" else "device") <= 0
    ]  # fmt: skip
    if not over:
        return None
    one = min(over, key=lambda one: _over(one, where))
    limit, missing = (one.memory_limit if where == "device" else one.host_limit), _over(one, where)
    gain = best.step_time / one.step_time - 1
    return (
        f"with {missing / limit:.0%} more {where} memory a rank ({format_bytes(missing)}) "
        f"a plan fits that is {gain:.0%} faster: {describe(one.strategy)}"
    )


def _over(one: SimResult, where: str) -> int:
    """Bytes by which a limit is missed."""
    if where == "device":
        return one.peak_memory - one.memory_limit
    return one.host_memory - one.host_limit


def _links(problem: Problem) -> list[str]:
    """What the job's nodes are joined by, where there are several, and the link to the host."""
    machine = problem.hardware
    domain, node = machine.scale_up_size, machine.devices_per_node
    if problem.num_nodes == 1:
        return [HOST_LINK]
    if problem.world_size <= domain:
        return [INSIDE, HOST_LINK]
    return [NETWORK if domain <= node else DOMAINS, HOST_LINK]


def _faster(found: SearchResult, problem: Problem, name: str) -> str | None:
    """What the best of the families do where a link is faster, and the memory behind it where that is in the
    way; None where the profile would be refused or none uses the link."""
    best, machine = found.best, problem.hardware
    assert best is not None
    near = [one for one in _others(found) if one.step_time <= NEAR * best.step_time][: RIVALS - 1]
    quick = faster(machine, *LINKS[name], MORE)
    if quick is None:
        return None
    if name == HOST_LINK and not any(one.host_memory for one in (best, *near)):
        return None
    plans = [best, *near]
    again = _again(problem, quick, plans)
    order = _order(again)
    said = f"with {name} {MORE:g} times as fast the step {_takes(best, again[0])}{order}"
    both = faster(quick, *DRAM, MORE) if name == HOST_LINK else None
    if both and (more := _again(problem, both, plans))[0].step_time * (1 + TIE) < again[0].step_time:
        order += _order(more)
        so = f"with both so fast it {_takes(best, more[0])}{_order(more)}"
        said = f"{said}; the host's DRAM bounds copies then, and {so}"
    return said if order else f"{said}; the order stays"


def _again(problem: Problem, hardware: HardwareProfile, plans: Sequence[SimResult]) -> list[SimResult]:
    """The same plans on another machine."""
    return [
        simulate(problem.model, hardware, problem.num_nodes, one.strategy, one.training, one.stack)
        for one in plans
    ]


def _takes(best: SimResult, again: SimResult) -> str:
    gain = best.step_time / again.step_time - 1
    return f"takes {format_seconds(again.step_time)} ({gain:.0%} faster)" if gain > TIE else "takes as long"


def _order(again: Sequence[SimResult]) -> str:
    """Which family is best now, where the first is not."""
    first = min(again, key=lambda one: one.step_time)
    if first.step_time * (1 + TIE) >= again[0].step_time:
        return ""
    return f", and {first.strategy.name} is best: {format_seconds(first.step_time)}"


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


def _others(found: SearchResult) -> list[SimResult]:
    """The best of the other families, fastest first."""
    best = found.best
    assert best is not None
    others = [one for one in found.best_by_family.values() if one and one.strategy.name != best.strategy.name]
    return sorted(others, key=lambda one: one.step_time)


def _rivals(found: SearchResult) -> list[str]:
    """How the best of each other family compares, and what it waits for."""
    best = found.best
    assert best is not None
    lines = []
    for one in _others(found):
        waits = _waits(one)
        said = f", waits {waits[0][1]:.0%} for {waits[0][0]}" if waits else ", waits for next to nothing"
        lines.append(f"{one.strategy.name} takes {one.step_time / best.step_time:.2f} times as long{said}")
    return lines
