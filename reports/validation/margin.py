"""How far measured peaks lie above predicted ones, and how often the upper bound of memory covers them."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from mopsim.engine import upper
from mopsim.validate.scoring import Scored, trusted
from mopsim.validate.simulated import as_read_at_most

QUANTILE = 0.95


@dataclass(frozen=True)
class Coverage:
    """Runs of one source whose peak was read. covered: at most the bound; left_out: at most a bound whose
    margin for the program is of the other sources alone."""

    runs: int
    covered: int
    left_out: int


def excess(scored: Iterable[Scored]) -> float | None:
    """What a measured peak is above the predicted one, over it: the quantile over the runs of grade A and B,
    a source's runs together weighing as much as another's. None where no peak was read."""
    rows = [(one.case.source.name, _excess(one)) for one in _read(scored)]
    if not rows:
        return None
    counts = Counter(source for source, _ in rows)
    left = (1 - QUANTILE) * len(counts)
    for source, above in sorted(rows, key=lambda row: -row[1]):
        left -= 1 / counts[source]
        if left < 0:
            return above
    return min(above for _, above in rows)


def coverage(scored: Iterable[Scored]) -> dict[str, Coverage]:
    """By source, of the runs of grade A and B."""
    rows = _read(scored)
    found = {}
    for source in sorted({one.case.source.name for one in rows}):
        mine = [one for one in rows if one.case.source.name == source]
        others = excess(one for one in rows if one.case.source.name != source)
        found[source] = Coverage(
            len(mine),
            sum(_covers(one, upper.PROGRAM) for one in mine),
            sum(_covers(one, others) for one in mine) if others is not None else 0,
        )
    return found


def _read(scored: Iterable[Scored]) -> list[Scored]:
    return [one for one in scored if one.case.measured.peak_memory and trusted(one.case)]


def _excess(one: Scored) -> float:
    assert one.case.measured.peak_memory is not None
    return one.case.measured.peak_memory / one.peak_memory - 1.0


def _covers(one: Scored, program: float) -> bool:
    case = one.case
    assert case.measured.peak_memory is not None
    return case.measured.peak_memory <= as_read_at_most(
        one.simulated, case.program().reading.memory, case.profile(), program
    )
