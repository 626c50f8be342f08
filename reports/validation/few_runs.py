"""What a few runs of one's own do for the intervals of the others: each source in turn is the user's."""

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean, median

from mopsim.report.validation_tables import Grid
from mopsim.validate.calibration import fit
from mopsim.validate.scored import Scored
from mopsim.validate.scoring import RunGroup, software

COUNTS = (0, 1, 2, 4, 8)
"""Runs that are calibrated on."""
ENOUGH = 12
"""Runs that a source has on a machine type, so that some are left to score."""
LEVEL = 0.9


def few_runs(scored: Sequence[Scored]) -> Grid:
    """Calibrated on so many runs of a source and machine type, evenly taken from their order by id; scored on
    the rest, those of other networks and of the same. Groups weigh alike."""
    groups: dict[tuple[str, str], list[Scored]] = defaultdict(list)
    for one in scored:
        if one.trusted and one.case.measured.step_time:
            groups[software(one.case)].append(one)
    table = Grid(
        "intervals of step time after calibration on a few runs of one's own", ("runs calibrated on",),
        ("groups", "mean error", f"{LEVEL:.0%} intervals that hold", "median width"),
    )  # fmt: skip
    for count in COUNTS:
        found = [_scored(sorted(some, key=_id), count) for some in groups.values() if len(some) >= ENOUGH]
        errors, shares, widths = ([one[i] for one in found] for i in range(3))
        cells = (f"{fmean(errors):.1%}", f"{fmean(shares):.1%}", f"{median(widths):.1%}")
        table.add_row(str(count), str(len(found)), *cells)
    return table


def _id(one: Scored) -> str:
    return one.case.id


def _scored(runs: Sequence[Scored], count: int) -> tuple[float, float, float]:
    """(mean error, share of the intervals that hold, median width) of the runs that were not taken."""
    taken = {round((i + 0.5) * len(runs) / count) for i in range(count)} if count else set()
    group = RunGroup([(one.case, one.simulated) for one in runs])
    points = group.points
    used = fit([points[i] for i in sorted(taken)], group.issue)
    spreads = {i: group.given(sorted(taken), i, "step_time", used=used) for i in points if i not in taken}
    errors, held, widths = [], [], []
    for i, spread in spreads.items():
        predicted, measured = used.apply(points[i]), points[i].measured
        low, high = spread.interval(predicted, LEVEL)
        errors.append(abs(predicted / measured - 1))
        held.append(low <= measured <= high)
        widths.append((high - low) / predicted)
    return fmean(errors), fmean(held), median(widths)
