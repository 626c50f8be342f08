"""Intervals of runs: what their errors have in common with those of other runs, and how many they hold."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import log
from statistics import fmean, median
from typing import Any

from mopsim.intervals.errors import ErrorCell, Name, cells, known_errors
from mopsim.intervals.made import Made
from mopsim.intervals.spread import Spread, spread
from mopsim.validate.case import Case
from mopsim.validate.scored import Scored


def cell(
    case: Case, measured: float | None = None, predicted: float = 1.0, reading: str = "", made: Made = ()
) -> ErrorCell:
    """A run by what it may have in common with others, and its error where it was measured. reading: how.
    made: what the prediction is made of."""
    return ErrorCell(
        source=case.source.name, stack=case.stack, hardware=case.hardware, precision=case.precision,
        network=case.identity(), reading=reading, made=made, runs=1,
        mean=log(measured / predicted) if measured else 0.0,
    )  # fmt: skip


def reading(case: Case) -> str:
    """What a case's peak was read from, empty where that is the live tensors themselves."""
    found = case.program().reading.memory
    return "" if found == "allocated" else found


def is_new(case: Case) -> bool:
    """Whether nothing is known of its source."""
    return case.source.name not in known_errors().of("step_time", case.stack).sources


def expected(case: Case, name: Name, own: Iterable[ErrorCell] = (), reading: str = "") -> Spread:
    """The error to expect of a run that is as usual, as if its source had never been seen, but for `own` runs
    of it."""
    known = known_errors().of(name, case.stack)
    seen = cells(map(known.usual, own))
    return spread(known.leaving_out(case.source.name), cell(case, reading=reading), seen)


@dataclass(frozen=True)
class Coverage:
    """Of runs of grade A and B: how many lie within their interval, by source (held, runs); width: median of
    its length over the prediction."""

    by_source: dict[str, tuple[int, int]]
    width: float

    @property
    def runs(self) -> int:
        return sum(count for _, count in self.by_source.values())

    @property
    def share(self) -> float:
        """Of the runs."""
        return sum(held for held, _ in self.by_source.values()) / self.runs

    def share_of(self, source: str) -> float:
        """Of the runs of one source."""
        held, runs = self.by_source[source]
        return held / runs

    @property
    def share_of_sources(self) -> float:
        """Sources weighing alike."""
        return fmean(map(self.share_of, self.by_source))

    def to_json(self) -> dict[str, Any]:
        by_source = {name: {"n": n, "within": held} for name, (held, n) in self.by_source.items()}
        return {
            "n": self.runs, "within": sum(held for held, _ in self.by_source.values()),
            "coverage": self.share, "coverage_sources_alike": self.share_of_sources,
            "median_width": self.width, "by_source": by_source,
        }  # fmt: skip


def coverage(scored: Iterable[Scored], name: Name, level: float) -> Coverage | None:
    """None where nothing was measured."""
    held: dict[str, list[bool]] = defaultdict(list)
    widths = []
    for one in scored:
        measured = getattr(one.case.measured, name)
        if measured is None or not one.trusted:
            continue
        low, high = one.interval(name, level)
        held[one.case.source.name].append(low <= measured <= high)
        widths.append((high - low) / one.predicted(name))
    if not widths:
        return None
    return Coverage({source: (sum(some), len(some)) for source, some in held.items()}, median(widths))
