"""A sweep of context lengths in words, tables and JSON."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.text import Text

from mopsim.common import io
from mopsim.common.units import format_count, format_probability
from mopsim.context.contenders import Contender
from mopsim.context.sweep import ContextCase, ContextPoint, Curve
from mopsim.intervals.spread import LEVEL, Ratio
from mopsim.report.page import Table
from mopsim.report.tables import between, rate
from mopsim.report.terminal import numbered, table
from mopsim.search.result import at_most, format_gap


def reach(curve: Curve) -> str:
    """The longest length that fits; at least that where the longest asked fits."""
    longest = curve.longest
    return f"{'' if curve.end else '>= '}{length_of(longest)}" if longest else "none"


def length_of(point: ContextPoint | None) -> str:
    """'256K', marked; 'none'."""
    return f"{format_count(point.seq_len)}{marks(point)}" if point else "none"


def marks(point: ContextPoint) -> str:
    """A star: fits, but with a probability below 0.9. A dagger: of the smallest step."""
    return ("*" if point.fits and not point.sure else "") + ("\u2020" if point.small else "")


def cell(point: ContextPoint | None) -> str:
    """Tokens per second and GPU, or what stops it."""
    if point is None:
        return ""
    if point.throughput is None:
        return f"out: {point.stopped_by}" if point.result else "not legal"
    return f"{point.throughput:,.0f}{marks(point)}"


def ratio(above: Curve, below: Curve, seq_len: int) -> float | None:
    """Throughput of one over the other's at a length, where both fit with the whole step."""
    one, other = above.at(seq_len), below.at(seq_len)
    if any(point and point.small for point in (one, other)):
        return None
    if one is None or other is None or not one.throughput or not other.throughput:
        return None
    return one.throughput / other.throughput


def lead(above: Curve, below: Curve, seq_len: int) -> Ratio | None:
    """The same with its error."""
    one, other = above.at(seq_len), below.at(seq_len)
    if ratio(above, below, seq_len) is None or not (one and other and one.result and other.result):
        return None
    return one.result.times_as_fast_as(other.result)


def leads(curves: Mapping[str, Curve], lengths: Sequence[int]) -> dict[str, list[Ratio | None]]:
    """How many times as fast the first contender is as each other, by length; where no length has a ratio the
    other is left out."""
    first = next(iter(curves.values()), None)
    found = {
        name: [lead(first, curve, length) for length in lengths]
        for name, curve in curves.items()
        if first and curve is not first
    }
    return {name: ratios for name, ratios in found.items() if any(ratios)}


def odds(one: Ratio | None) -> str:
    return format_probability(one.p_faster) if one else ""


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def case_name(case: ContextCase) -> str:
    name = case.model.name
    size = name.removeprefix("mop_").upper() if name.startswith("mop_") else name
    return f"{size} on {case.world_size} devices"


def case_title(case: ContextCase) -> str:
    return f"{case_name(case)} of {case.hardware.name}"


def step_of(case: ContextCase) -> str:
    """'131,072 tokens per GPU and step': how large the whole steps are."""
    return f"{case.tokens_per_device:,} tokens per {case.hardware.each} and step"


def _rate(curves: Iterable[Curve]) -> str:
    """'tokens/s per GPU': what the cells are."""
    return rate(one.result.each for curve in curves for one in curve.points if one.result)


def case_table(curves: Mapping[str, Curve], lengths: Sequence[int]) -> Table:
    """Throughput by contender and length, and the first contender's over each other's."""
    rows = [
        [curve.contender.label, *(cell(curve.at(length)) for length in lengths)] for curve in curves.values()
    ]
    first, *_ = curves.values()
    for name, ratios in leads(curves, lengths).items():
        label = f"{first.contender.label} over {curves[name].contender.label}"
        ends = [one and one.interval(LEVEL) for one in ratios]
        rows.append([label, *(times(one.predicted if one else None) for one in ratios)])
        rows.append([f"{label}, {LEVEL:.0%}", *((pair and between(pair, times)) or "" for pair in ends)])
        rows.append([f"probability that {first.contender.label} is faster", *map(odds, ratios)])
    return Table([f"{_rate(curves.values())} at", *(format_count(length) for length in lengths)], rows)


def shown_table(case: ContextCase, curves: Mapping[str, Curve], lengths: Sequence[int]) -> Group:
    """The same on a terminal of 80 columns: contenders are numbers, which stand below with how far they come;
    '1/2' is how many times as fast the first is as the second."""
    title = f"{case_title(case)}, {_rate(curves.values())}; {step_of(case)}"
    found = table("", ("#",), [format_count(length) for length in lengths])
    compared, names = leads(curves, lengths), [*curves]
    cells = [[cell(curve.at(length)) for length in lengths] for curve in curves.values()]
    for number, row in enumerate(cells, 1):
        found.add_row(str(number), *(one.partition(":")[0].replace("not legal", "-") for one in row))
    for name, ratios in compared.items():
        found.add_row(
            f"1/{names.index(name) + 1}", *(times(one.predicted if one else None) for one in ratios)
        )
        found.add_row("P", *map(odds, ratios), style="dim")
    said = [
        *_legend(curves, lengths),
        "after a name: the longest of the lengths asked that fits",
        *_compared(compared),
        *software(one.contender for one in curves.values()),
    ]
    gaps = [f"; gap {format_gap(_gap(curve))}" if _gap(curve) else "" for curve in curves.values()]
    said += ["gap: a plan that was not simulated is at most so much faster"] if any(gaps) else []
    lines = [
        Text(f"{_end(curve)}{gap}; on {curve.contender.runs_on}")
        for curve, gap in zip(curves.values(), gaps, strict=True)
    ]
    return Group(Text(title, style="italic"), found, numbered(lines), Text("; ".join(said), style="dim"))


def _compared(leads: Mapping[str, Sequence[Ratio | None]]) -> list[str]:
    """What ratios and their odds are, and how far off they may be."""
    factors = [
        end / one.predicted
        for ratios in leads.values()
        for one in ratios
        if one
        for end in one.interval(LEVEL)
    ]
    if not factors:
        return []
    least, most = min(factors), max(factors)
    return [
        "1/2: how many times as fast 1 is as 2",
        "P: the probability that 1 is the faster one in a run",
        f"with {LEVEL:.0%} a measured ratio is {least:.2g} to {most:.2g} times the printed one",
    ]


def software(contenders: Iterable[Contender]) -> list[str]:
    """That ratios are of plans and software where that differs, and which software is assumed."""
    stacks = {one.runs_on: one.assumed for one in contenders}
    found = ["ratios hold for plan and software together"] * (len(stacks) > 1)
    return found + [f"{name} is an assumption, no one program" for name, assumed in stacks.items() if assumed]


MARKS = {
    "out": "out: does not fit", "not legal": "-: not legal", "*": "*: fits with a probability below 0.9",
    "\u2020": "\u2020: of the smallest step",
}  # fmt: skip
"""Of a cell -> what it says."""


def _legend(curves: Mapping[str, Curve], lengths: Sequence[int]) -> list[str]:
    """What the marks say that the cells have."""
    told = "".join(cell(curve.at(length)) for curve in curves.values() for length in lengths)
    return [text for mark, text in MARKS.items() if mark in told]


def ends(curves: Mapping[str, Curve], lengths: Sequence[int]) -> str:
    """Where each contender ends, and what stops it; then what the marks of its table say."""
    marked = [text for text in _legend(curves, lengths) if text[0] in "*\u2020"]  # the others are spelt out
    legend = f" {'; '.join(marked)}." if marked else ""
    found = "; ".join(map(_end, curves.values()))
    on = "; ".join(f"{one.contender.label} on {one.contender.runs_on}" for one in curves.values())
    said = "; ".join([on, *software(one.contender for one in curves.values())])
    return f"Reach, of the lengths asked: {found}.{left_out(curves)}{legend} Software: {said}."


def _end(curve: Curve) -> str:
    stop = f", stopped at {format_count(curve.end.seq_len)} by {curve.end.stopped_by}" if curve.end else ""
    return f"{curve.contender.label}: {reach(curve)}{stop}"


def _gap(curve: Curve) -> float:
    return max((one.gap for one in curve.points), default=0.0)


def left_out(curves: Mapping[str, Curve]) -> str:
    """That the ratios are of searches that were not exhausted, and by how much each may be short."""
    gaps = {curve.contender.label: _gap(curve) for curve in curves.values()}
    short_of = [f"{label} {at_most(gap)}" for label, gap in gaps.items() if gap]
    return f" Not exhausted: plans left out may be faster: {', '.join(short_of)}." if short_of else ""


def to_json(
    cases: Sequence[ContextCase],
    curves: Sequence[Mapping[str, Curve]],
    contenders: Sequence[Contender],
    lengths: Sequence[int],
) -> dict[str, Any]:
    """SI units: tokens, seconds, bytes."""
    return {
        "lengths": list(lengths),
        "contenders": {
            one.name: {
                "label": one.label,
                "rules": one.rules,
                "stack": one.runs_on,
                "stack_assumed": one.assumed,
            }
            for one in contenders
        },
        "cases": [
            {
                "model": case.model.name,
                "hardware": case.hardware.name,
                "nodes": case.nodes,
                "devices": case.world_size,
                "each": case.hardware.each,
                "tokens_per_device": case.tokens_per_device,
                "document_tokens": case.documents,
                "curves": curves_json(found),
                "ratios": _leads_json(found, lengths),
            }
            for case, found in zip(cases, curves, strict=True)
        ],
    }


def curves_json(curves: Mapping[str, Curve]) -> dict[str, Any]:
    """Of one case, by contender."""
    return {
        name: {
            "longest": curve.longest.seq_len if curve.longest else None,
            "longest_with_the_whole_step": curve.whole.seq_len if curve.whole else None,
            "stopped_by": curve.end.stopped_by if curve.end else None,
            "strategy_at_longest": _strategy(curve.longest),
            "points": [_point_json(point) for point in curve.points],
        }
        for name, curve in curves.items()
    }


def _leads_json(curves: Mapping[str, Curve], lengths: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """Of the first contender over each other one."""
    return {
        name: [
            {
                "seq_len": length, "ratio": one.predicted, "interval": LEVEL,
                "ratio_interval": list(one.interval(LEVEL)), "p_faster": one.p_faster,
            }
            for length, one in zip(lengths, ratios, strict=True) if one
        ]
        for name, ratios in leads(curves, lengths).items()
    }  # fmt: skip


def _strategy(point: ContextPoint | None) -> Any:
    return io.to_plain(point.result.strategy) if point and point.result else None


def _point_json(point: ContextPoint) -> dict[str, Any]:
    result = point.result
    found: dict[str, Any] = {
        "seq_len": point.seq_len,
        "global_batch": point.global_batch,
        "smallest_step": point.small,
        "verdict": point.verdict,
        "stopped_by": point.stopped_by or None,
        "tokens_per_s_per_device": point.throughput,
        "gap": point.gap,
    }
    if result:
        found |= {
            **result.intervals(LEVEL),
            "step_time_s": result.step_time,
            "mfu": result.mfu,
            "peak_memory_bytes": result.peak_memory,
            "memory_limit_bytes": result.memory_limit,
            "memory_by_category_bytes": result.memory_by_category,
            "host_memory_bytes": result.host_memory,
            "host_limit_bytes": result.host_limit,
            "strategy": result.line,
        }
    return found
