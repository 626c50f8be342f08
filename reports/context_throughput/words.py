"""What a study of context lengths says, in cells and sentences that follow from its curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mopsim.common.units import format_count
from mopsim.context.contenders import Contender
from mopsim.context.sweep import ContextCase, Curve
from mopsim.report.context import case_name, length_of, ratio, reach
from reports.context_throughput.published import POINTS, PRINTED_END, Published
from reports.context_throughput.variants import Variant


@dataclass(frozen=True)
class Study:
    """All that was found. curves: of each case, by contender. variants: of the first case, each with its
    curves."""

    cases: Sequence[ContextCase]
    curves: Sequence[Mapping[str, Curve]]
    variants: Sequence[tuple[Variant, Mapping[str, Curve]]]
    lengths: Sequence[int]
    contenders: Sequence[Contender]


def published_of(case: ContextCase) -> list[Published]:
    """The published points of a case."""
    return [one for one in POINTS if one.model == case.model.name and one.devices == case.world_size]


def finding(case: ContextCase, curves: Mapping[str, Curve]) -> str:
    """Where each contender ends, and how MoP compares with the least restricted baseline while that runs."""
    ends = []
    for curve in curves.values():
        stop = f", stopped by {curve.end.stopped_by}" if curve.end else ""
        ends.append(f"{curve.contender.label} {reach(curve)}{stop}")
    low, high = span([curves])
    speed = f"MoP is {low:.2f}x to {high:.2f}x as fast as the least restricted FSDP2 where both run"
    return f"Reach: {'; '.join(ends)}. {speed}."


def span(all_curves: Sequence[Mapping[str, Curve]]) -> tuple[float, float]:
    """Least and most of MoP's throughput over unrestricted FSDP2's, where both run; (0, 0) if nowhere."""
    found = [
        value
        for curves in all_curves
        for point in curves["mop"].points
        if (value := ratio(curves["mop"], curves["fsdp2"], point.seq_len))
    ]
    return (min(found), max(found)) if found else (0.0, 0.0)


def range_of(study: Study, name: str) -> str:
    """Where a contender ends over all cases: '256K to 1M'; at least that where the sweep ended first."""
    found = [curves[name] for curves in study.curves if name in curves]
    return _from_to([(curve.longest.seq_len if curve.longest else 0, not curve.end) for curve in found])


def surely(study: Study, name: str) -> str:
    """The same of what fits with a probability of 0.9, in brackets; nothing where that is as far."""
    found = [curves[name] for curves in study.curves if name in curves]
    lengths = [max((one.seq_len for one in curve.points if one.sure), default=0) for curve in found]
    ends = [
        (length, not curve.end and length == curve.points[-1].seq_len)
        for curve, length in zip(found, lengths, strict=True)
    ]
    told = _from_to(ends)
    return "" if told == range_of(study, name) else f" ({told} with a probability of 0.9)"


def _from_to(ends: Sequence[tuple[int, bool]]) -> str:
    names = [_so_far(*end) for end in (min(ends), max(ends))]
    return names[0] if names[0] == names[1] else f"{names[0]} to {names[1]}"


def _so_far(length: int, unended: bool) -> str:
    return ("at least " if unended else "") + format_count(length) if length else "no length at all"


def as_printed(study: Study) -> str:
    """Under which rules FSDP2 ends where the sources say."""
    parts = []
    for case, curves in zip(study.cases, study.curves, strict=True):
        ends = {curve.contender.label.removeprefix("FSDP2, "): curve.longest for curve in curves.values()}
        near = [label for label, end in ends.items() if end and end.seq_len <= PRINTED_END]
        never = [label for label, end in ends.items() if end is None]
        parts.append(
            f"{case_name(case)}: {' or '.join(near) or 'none of these'}"
            + (f" (at no length: {', '.join(never)})" if never else "")
        )
    return (
        "The sources print that FSDP2's longest context is 128K at 120B, and that it runs out of memory "
        "beyond 64 to 128K at about 600B and 1T. Here the rules under which it ends at "
        f"{format_count(PRINTED_END)} or before are: {'; '.join(parts)}."
    )


def smaller(study: Study) -> str:
    """Who reaches further with one sequence for each group of ranks than with the whole step."""
    parts = []
    for case, curves in zip(study.cases, study.curves, strict=True):
        found = [
            f"{curve.contender.label} {reach(curve)} instead of {length_of(curve.whole)}"
            for curve in curves.values()
            if _further(curve)
        ]
        parts += [f"{case_name(case)}: {', '.join(found)}"] if found else []
    if not parts:
        return "No contender reaches further with a smaller step."
    return (
        "A dagger: the whole step does not fit, since from its second microbatch on accumulated gradients "
        "lie beside the activations. The smallest legal step fits: one sequence for each group of ranks "
        f"that shares one. The throughput is that of this step. {'; '.join(parts)}."
    )


def farthest(study: Study) -> str:
    """The least and the most that FSDP2 reaches where it runs at all."""
    found = [curve for curves in study.curves for name, curve in curves.items() if name != "mop"]
    ends = sorted((curve.longest.seq_len, not curve.end) for curve in found if curve.longest)
    return f"{_so_far(*ends[0])} to {_so_far(*ends[-1])}" if ends else "none"


def summary(study: Study) -> str:
    """The whole in a few sentences."""
    low, high = span(study.curves)
    parts = [
        f"MoP reaches {range_of(study, 'mop')} tokens{surely(study, 'mop')}. FSDP2 with a chunked loss, any "
        f"context parallelism and CPU offload reaches {range_of(study, 'fsdp2')}{surely(study, 'fsdp2')}. "
        f"Where both run, MoP has {low:.2f}x to {high:.2f}x its throughput."
    ]
    for name, what in (
        ("fsdp2_full", "With all logits of a rank at once FSDP2 ends at {}"),
        ("fsdp2_node", "if a sequence also stays in a node, at {}"),
        ("fsdp2_half_node", "if it stays in half a node, at {}"),
        ("fsdp2_device", "with all logits and nothing on the host, at {}"),
    ):
        if all(name in curves for curves in study.curves):
            parts.append(what.format(range_of(study, name)))
    ends = f" {'; '.join(parts[1:])}." if parts[1:] else ""
    small = [curve for curves in study.curves for curve in curves.values() if _further(curve)]
    names = list(dict.fromkeys(curve.contender.label for curve in small))
    steps = (
        f" In some cases only the smallest legal step fits at the end: {'; '.join(names)}." if names else ""
    )
    return parts[0] + ends + steps


def _further(curve: Curve) -> bool:
    """Whether the longest length fits with the smallest step only."""
    return curve.longest is not None and curve.longest.small
