"""What to measure before signing: what each micro-benchmark would leave of the interval of days."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace
from scipy.special import ndtri

from mopsim.intervals.spread import LEVEL
from mopsim.size.benchmarks import Benchmark, measurements, of_machine, settled_by_plan, tag_of
from mopsim.size.figures import Figures, deviation
from mopsim.size.points import Point
from mopsim.size.whatif import Swing


@dataclass(frozen=True)
class Settled:
    """What a measurement leaves of the interval of days. before, after: half its width over its middle."""

    benchmark: Benchmark
    before: float
    after: float


def settle(point: Point, swings: Sequence[Swing], level: float = LEVEL) -> list[Settled]:
    """What each measurement would leave of the interval of days, best first; the last is the plan itself.
    level: the interval's probability.

    A kind's share of the variance of ln(days) is the square of a quarter of its swing's width in
    deviations; together they are at most what machines tell (`of_machine`).
    """
    (result, bill), known_now = point.step_and_bill, measurements()
    left, most = settled_by_plan(bill), of_machine(bill, result)
    parts = {
        one.name: deviation(one.low.days, one.high.days) ** 2
        for one in swings
        if any(one.name in benchmark.kinds for benchmark in known_now.benchmarks)
    }
    scale = min(1.0, most / sum(parts.values())) if parts else 0.0
    found = []
    for benchmark in known_now.benchmarks:
        gained = 0.0
        for kind in benchmark.kinds:
            before = known_now.spread[tag_of(point.hardware, kind, point.num_devices)]
            gained += parts.get(kind, 0.0) * scale * max(0.0, 1 - (known_now.after / before) ** 2)
        if gained:
            nodes = min(benchmark.nodes, point.num_nodes)
            found.append(_settled(replace(benchmark, nodes=nodes), bill, bill.deviation**2 - gained, level))
    whole = Benchmark(
        name="the plan itself, shortened to few layers or nodes",
        kinds=(),
        nodes=max(1, min(4, point.num_nodes)),
        how="mopexec train, or the exported configuration, for 50 steps; then mopsim calibrate and size",
    )
    return [*sorted(found, key=lambda one: one.after), _settled(whole, bill, left, level)]


def _settled(benchmark: Benchmark, bill: Figures, variance: float, level: float) -> Settled:
    wide = float(ndtri((1 + level) / 2))
    return Settled(
        benchmark, math.expm1(wide * bill.deviation), math.expm1(wide * math.sqrt(max(variance, 0.0)))
    )
