"""Time of layers that are not played (mopsim.program.composed), and whether they may be left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from mopsim.engine.record import Record, Tally
from mopsim.program.workload import Program, Repeat, Workload, first_compute

STEADY = 5e-4
"""Part of a step by which the gaps may be wrong, as the periods before them tell."""

CYCLE = 3
"""Turns of a pipeline that are repeated together at most: what ranks wait for may recur from turn to turn."""

FILLED = 2
"""Ranks of an interleaved pipeline of which each begins a turn while it is filled."""


def added(program: Program, record: Record, until: int | None = None) -> dict[int, float]:
    """Seconds by turn that the gaps stand for; until: of those before that op."""
    found: dict[int, float] = {}
    for repeat in program.repeats:
        if until is None or repeat.gap < until:
            turn = record.turns[repeat.gap]
            found[turn] = found.get(turn, 0.0) + repeat.times * _period(program, record, repeat)
    return found


def steady(program: Program, record: Record, step_time: float) -> bool:
    """Whether the period before each gap did what the one before that did, an equal time later, on all
    streams."""
    return sum(_drift(program, record, repeat) for repeat in program.repeats) <= STEADY * step_time


@dataclass(frozen=True)
class ShorterPlay:
    """A pipeline of which `microbatches` were played in `end` seconds."""

    microbatches: int
    end: float


@dataclass(frozen=True)
class Turns:
    """The last `count` turns played, which those that are not played repeat: seconds of `unit` of them."""

    count: int
    seconds: float


def repeated(
    workload: Workload, records: Sequence[Record], end: float, before: ShorterPlay | None = None
) -> Turns | None:
    """What stands for the microbatches that are not played; None where none may yet. before: with fewer
    played.

    Either the last turn took all ranks equally long, and as long as the one before, and no rank is busy
    longer; then none runs ahead of another any more, and turns of two lengths do not alternate. Of an
    interleaved pipeline that has just been filled, one rank has to be busy as long. Or turns differ in a
    pattern that comes again (docs/adr/0068): then the turns since `before` took, on average, what they took
    the slowest rank over a round of the stages. No rank can be slower for good, as its turn waits for none
    that is more than a round back; and none goes on to be faster, as the end did not. The pattern itself, of
    which a part may be left, has to be flat.
    """
    if not workload.repeats:
        return Turns(workload.unit, 0.0)
    last, unit, round_ = lasted(workload, records), workload.unit, len(workload.programs)
    step_time = end + workload.repeats * mean(last)
    uneven = max(last) - min(last)
    if round_ > 1:
        own = _own(workload, records) - mean(last)
        settled = unit == 1 or workload.expanded > 3 * unit
        uneven = max(uneven, own, _alternation(workload, records, mean(last)) if settled else -own)
    if workload.repeats * uneven <= STEADY * step_time:
        return Turns(min(CYCLE, max(1, round_ - 1)) if unit == 1 else unit, mean(last))
    if before is None:
        return None
    took = (end - before.end) / (workload.expanded - before.microbatches)
    most = max(_began(workload, records, round_)) / round_
    wrong = (workload.microbatches - workload.expanded) * abs(most - took)
    uneven = max(
        abs(one - turns * took) for turns in range(1, round_) for one in _began(workload, records, turns)
    )
    if wrong + uneven > STEADY * step_time:
        return None
    return Turns(round_, unit * took)


def lasted(workload: Workload, records: Sequence[Record]) -> list[float]:
    """Seconds of the ranks' last turns, of `unit` microbatches, before the one in which the pipeline drains.
    A stage's turn begins once what it waits for is there: what it has waited for since the pipeline was
    filled is no part of it. Of an interleaved pipeline the first ranks, filled last, are left out."""
    if len(records) == 1:
        last = workload.expanded - 1
        return [records[0].turn(last).ready - records[0].turn(last - workload.unit).ready]
    return _began(workload, records, workload.unit)


def _began(workload: Workload, records: Sequence[Record], turns: int) -> list[float]:
    """Seconds from so many turns before the last one began until that began, by rank."""
    last = workload.expanded - 1
    if workload.unit > FILLED + 1:
        records = records[FILLED:]
    return [one.turn(last).start - one.turn(last - turns).start for one in records]


def _alternation(workload: Workload, records: Sequence[Record], last: float) -> float:
    """Seconds by which the last turn is off the mean of it and the one before. 0 where the one before filled
    the pipeline."""
    if workload.unit == 1 and workload.expanded <= 2 * len(records):
        return 0.0
    return abs(mean(_began(workload, records, 2 * workload.unit)) / 2 - last)


def _own(workload: Workload, records: Sequence[Record]) -> float:
    """Seconds of `unit` turns in which the busiest rank waits for no other stage: no turn is shorter once all
    keep step, and where it never waits none is longer."""
    turns = range(workload.expanded - 1 - workload.unit, workload.expanded - 1)
    parts = [[one.tallies[i] for i in turns if i in one.tallies] for one in records]
    return max(sum(_spent(tally) for tally in one) for one in parts)


def _spent(tally: Tally) -> float:
    return sum(tally.component.values()) - sum(
        tally.exposed.get(kind, 0.0) for kind in ("peers", "send_recv")
    )


def _period(program: Program, record: Record, repeat: Repeat) -> float:
    first, after = first_compute(program, repeat.first), first_compute(program, repeat.gap + 1)
    return record.starts[after] - record.starts[first]


def _drift(program: Program, record: Record, repeat: Repeat) -> float:
    """Seconds by which the gap may be wrong: by as much as an op ends earlier or later in one period than in
    the other, as often as it is repeated, and by as much as the host's lead is used up before the gap is
    over; any number where the periods have other ops, or where a stream still works off what earlier layers
    left it: that would be done within the gap."""
    size = repeat.gap - repeat.first
    first, period = first_compute(program, repeat.first), _period(program, record, repeat)
    backlog = max(record.ends[: repeat.before], default=0.0) > record.starts[first]
    if repeat.first - repeat.before != size or backlog:
        return float("inf")
    shift = record.starts[first] - record.starts[first_compute(program, repeat.before)]
    most = abs(period - shift)
    for index in range(repeat.first, repeat.gap):
        most = max(most, abs(record.ends[index] - record.ends[index - size] - shift))
    lead = min(record.starts[index] - record.issued[index] for index in range(repeat.first, repeat.gap))
    return repeat.times * most + max(0.0, record.behind.get(repeat.gap, 0.0) - lead)
