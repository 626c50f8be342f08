"""What a predicted time is made of, as shares that sum to 1: kinds of compute, and what it waits for."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from math import inf

from mopsim.engine.record import Span
from mopsim.intervals.made import divided
from mopsim.spec.hardware import HardwareProfile
from mopsim.validate import parts
from mopsim.validate.component import Component

Shares = tuple[tuple[str, float], ...]
"""(kind, share of the time), largest first."""


def of_step(step: float, exposed: Mapping[str, float], busy: Mapping[str, float]) -> Shares:
    """Of a step in seconds: exposed seconds by kind; the rest divides over the kernels as their busy seconds
    do."""
    waits = {f"{kind} exposed": seconds for kind, seconds in exposed.items()}
    rest = max(0.0, step - sum(exposed.values()))
    return _shares((divided(rest, busy) or {"compute": rest}) | waits)


def of_spans(spans: Iterable[Span]) -> Shares:
    """Of the time from the first start to the last end: components of the compute stream, and the other
    streams that are at work while it is not."""
    spans = list(spans)
    edges = sorted({edge for span in spans for edge in (span.start, span.end)})
    found: dict[str, float] = defaultdict(float)
    for start, end in pairwise(edges):
        running = {span.stream: span for span in spans if span.start <= start and span.end >= end}
        if "compute" in running:
            found[running["compute"].component] += end - start
        else:
            found[f"{'+'.join(sorted(running))} exposed" if running else "idle"] += end - start
    return _shares(found)


def of_component(component: Component, hardware: HardwareProfile) -> Shares:
    """Of a component's predicted time; nothing where it is not of a played program."""
    result = parts.played(component, hardware)
    if result is None:
        return ()
    if component.kind == "expert_dispatch":
        forward = component.text("pass") == "forward"
        return of_spans(span for span in result.spans if span.phase == "forward" or not forward)
    if component.kind == "optimizer_step":
        return of_spans(span for span in result.spans if span.component == "optimizer")
    return of_step(result.step_time, result.exposed, result.busy)


def words(shares: Shares, most: int = 4) -> str:
    """The largest kinds, as 'compute 61 %, all_to_all exposed 20 %'."""
    return ", ".join(f"{kind} {share:.0%}" for kind, share in shares[:most] if share >= 0.01)


def _shares(seconds: Mapping[str, float]) -> Shares:
    total = sum(seconds.values()) or inf
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return tuple((kind, value / total) for kind, value in ordered if value > 0.0)
