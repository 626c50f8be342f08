"""What a comparison of strategies comes to, in words: who is fastest or ties, how surely, and why."""

from collections.abc import Mapping, Sequence

from mopsim.common.units import format_probability, format_seconds
from mopsim.engine import SimResult
from mopsim.intervals.spread import SURE, Ratio
from mopsim.report.lanes import named
from mopsim.search.result import TIE, Left, exhausted, format_gap, promises, surer
from mopsim.spec.categories import WAITING
from mopsim.spec.line import waits_for

Results = Mapping[str, SimResult | None]
"""Of strategies, by label; None: there is no legal one."""
Searched = Mapping[str, Left]
"""Of strategies that a search found, by label: SearchResult.left."""
SHOWN = 6
"""Stacks of those that could run all strategies that are named at most; where there are more, two of them
make room."""


def finding(
    results: Results,
    searched: Searched | None = None,
    level: float = 0.9,
    at_risk: Mapping[str, SimResult] | None = None,
) -> list[str]:
    """The winner, by how much and how surely, or that nothing fits; in sentences of their own what the
    searches promise that were not exhausted, and what they left as too unsure to fit. Without full stops.
    level: of the ratio's interval. at_risk: by label, SearchResult.at_risk."""
    found = headline(results) + _how_surely(results, searched or {}, level)
    still = [(label, left) for label, left in (searched or {}).items() if not exhausted(left[0])]
    unsure = [_with_risk(label, one, results) for label, one in (at_risk or {}).items()]
    return [found, *(f"Search of {one}" for one in (*promises(still), *unsure))]


def _with_risk(label: str, one: SimResult, results: Results) -> str:
    """That a label's plan is more likely to fit than a faster one, and what the comparison would come to with
    that."""
    own = results[label]
    assert own is not None  # at_risk is of a search that found a plan
    note = f"search --risk ranks it; with it {headline({**results, label: one})}"
    return f"{label}: its plan is {surer(own, one, note)}"


def _fastest_first(results: Results) -> list[tuple[str, SimResult]]:
    """Those that fit."""
    fitting = [(label, one) for label, one in results.items() if one and one.fits]
    return sorted(fitting, key=lambda one: (one[1].ranked_time, one[0]))


def _ranked(results: Results) -> tuple[list[tuple[str, SimResult]], list[tuple[str, SimResult]]]:
    """(the fastest that fits and those that tie with it, the slower ones), fastest first."""
    order = _fastest_first(results)
    first = [one for one in order if one[1].ranked_time <= (1 + TIE) * order[0][1].ranked_time]
    return first, order[len(first) :]


def outcome(results: Results) -> str:
    """'mop is fastest', 'mop and fsdp2 tie', 'mop is the only one that fits' or 'no strategy fits'. Where
    being legal alone stops the others, memory is not named."""
    first, slower = _ranked(results)
    legal = sum(one is not None for one in results.values())
    if not first:
        return "no strategy fits" if legal or not results else "no strategy is legal"
    tied = dict(first)
    names = [label for label in results if label in tied]  # in one order, whoever is ahead by less than a tie
    if len(names) > 1:
        return f"{', '.join(names[:-1])} and {names[-1]} tie"
    if slower:
        return f"{names[0]} is fastest"
    if len(results) == 1:
        return f"{names[0]} fits"
    return f"{names[0]} is the only one that {'fits' if legal > 1 else 'is legal'}"


def headline(results: Results) -> str:
    """The outcome, and how many times as fast the first is as the next that does not tie."""
    first, slower = _ranked(results)
    if not first:
        return outcome(results).capitalize()
    within = f" within {format_gap(TIE)}" if len(first) > 1 else ""
    ahead = ""
    if slower:
        other, second = slower[0]
        ahead = f", {second.ranked_time / first[0][1].ranked_time:.2f}x as fast as {other}"
    runs = " by your runs" if (within or ahead) and first[0][1].corrected_step_time is not None else ""
    return f"{outcome(results)}{within}{ahead}{runs}"


def lead(results: Results) -> tuple[str, float, Ratio] | None:
    """The next best's label, how many times as fast the winner is, and how surely; None where fewer than two
    fit."""
    order = _fastest_first(results)
    if len(order) < 2:
        return None
    (_, first), (label, second) = order[:2]
    return label, second.ranked_time / first.ranked_time, first.times_as_fast_as(second)


def odds(results: Results) -> str:
    """'probability 0.53': that the fastest is faster than the next that does not tie; empty without one."""
    first, slower = _ranked(results)
    if len(first) != 1 or not slower:
        return ""
    return f"probability {format_probability(first[0][1].times_as_fast_as(slower[0][1]).p_faster)}"


def doubts(results: Results) -> str:
    """'may not fit: P 0.75', where several fit 'a may not fit: P 0.75': those that fit, but with a
    probability below SURE."""
    fitting = {label: one for label, one in results.items() if one and one.fits}
    return ", ".join(
        f"{label if len(fitting) > 1 else ''} may not fit: P {format_probability(one.p_fits)}".strip()
        for label, one in fitting.items()
        if unsure(one)
    )


def risks(results: Results) -> str:
    """'mop fits, as described, with probability 0.17 only': of those that fit, but are not sure to."""
    found = {label: one for label, one in results.items() if one and one.fits and not one.sure}
    return "; ".join(f"{label} {one.chance} only" for label, one in found.items())


def unsure(one: SimResult) -> bool:
    """Whether it fits, but with a probability below SURE."""
    return one.fits and one.p_fits < SURE


def _how_surely(results: Results, searched: Searched, level: float) -> str:
    """Of the lead over the next that does not tie, of the plans found where a faster one of its search is
    expected to be left out; where all tie, of the first over the next."""
    first, slower = _ranked(results)
    if len(first) + len(slower) < 2:
        return ""
    name, fastest = first[0]
    ratio = fastest.times_as_fast_as((slower or first[1:])[0][1])
    low, high = ratio.interval(level)
    sure = format_probability(ratio.p_faster)
    if not slower:
        return f" ({name} {low:.2f}x to {high:.2f}x as fast with {level:.0%})"
    of = "of the plans found " if searched.get(slower[0][0], (0.0, 0.0))[1] else ""
    return f" ({low:.2f}x to {high:.2f}x with {level:.0%}; {of}it is the faster one with probability {sure})"


def difference(results: Results) -> str:
    """Where the next that does not tie loses most to the fastest, as simulated; of the optimizer, that it
    runs once a step."""
    first, slower = _ranked(results)
    if not slower or slower[0][1].step_time <= first[0][1].step_time:
        return ""
    best, (name, other) = first[0][1], slower[0]
    before, parts = _parts(best), _parts(other)
    more = {kind: seconds - before.get(kind, 0.0) for kind, seconds in parts.items()}
    kind = max(more, key=more.__getitem__)
    if more[kind] <= 0.0:
        return ""
    once = " (once a step, whatever its tokens: a larger batch narrows the difference)"
    note = once if "optimizer" in kind else ""
    return f"{name} loses most time in {kind}: {format_seconds(more[kind])}{note}"


def _parts(one: SimResult) -> dict[str, float]:
    """Seconds of each component, and of waiting for what compute waits for."""
    ran = {named(kind, "components"): part for kind, part in one.time_by_component.items() if kind != WAITING}
    return ran | {f"waiting for {waits_for(kind, one.strategy)}": part for kind, part in one.exposed.items()}


def leaders(results: Results) -> tuple[str, str] | None:
    """The fastest and the next best, where they run on different stacks."""
    order = _fastest_first(results)[:2]
    if len(order) < 2 or order[0][1].stack == order[1][1].stack:
        return None
    return order[0][0], order[1][0]


def software(results: Results, stacks: Sequence[str] | None = None, alike: str = "") -> str:
    """That the winner's lead is of plan and software, where the next best runs on another stack. stacks:
    those that could run all strategies, where they are known. alike: how both compare with less between
    them."""
    what, *rest = _software(results, stacks, alike) or [""]
    return ": ".join(filter(None, (what, "; ".join(rest))))


def _software(results: Results, stacks: Sequence[str] | None, alike: str) -> list[str]:
    """What `software` says, a sentence each."""
    both = leaders(results)
    if both is None:
        return []
    named = ", ".join(f"{label} on {one.stack.name}" for label, one in _fastest_first(results)[:2])
    what = "ratio" if len(_ranked(results)[0]) < 2 else "tie"
    found = [f"The {what} holds for plan and software together ({named})", alike, _on_one(stacks)]
    return [one for one in found if one]


def _on_one(stacks: Sequence[str] | None) -> str:
    """How all are simulated on one stack."""
    if stacks is None:
        return "--stack NAME simulates all plans on one stack"
    if not stacks:
        return "no shipped stack runs a plan of each"
    shown = stacks if len(stacks) <= SHOWN else stacks[: SHOWN - 2]
    rest = f" and {len(stacks) - len(shown)} others" if len(shown) < len(stacks) else ""
    named = f"{', '.join(shown)}{rest} {'run' if len(stacks) > 1 else 'runs'}"
    return f"--stack NAME simulates all plans on one stack ({named} a plan of each)"


def verdict(
    results: Results,
    searched: Searched | None = None,
    level: float = 0.9,
    stacks: Sequence[str] | None = None,
    alike: str = "",
    at_risk: Mapping[str, SimResult] | None = None,
) -> list[str]:
    """Sentences without their full stops: the finding, what of the searches is open, what may not fit, what
    is due to software, and where the difference lies."""
    found = [
        *finding(results, searched, level, at_risk),
        risks(results),
        *(one[:1].upper() + one[1:] for one in _software(results, stacks, alike)),
        difference(results),
    ]
    return [one for one in found if one]
