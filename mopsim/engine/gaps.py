"""Time of layers that are not played (mopsim.program.composed), and whether they may be left out."""

from collections.abc import Sequence
from statistics import mean

from mopsim.engine.record import Record
from mopsim.program.workload import Program, Repeat, Workload, first_compute

STEADY = 5e-4
"""Part of a step by which the gaps may be wrong, as the periods before them tell."""

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


def lasted(workload: Workload, records: Sequence[Record]) -> list[float]:
    """Seconds of the ranks' last turns, of `unit` microbatches, before the one in which the pipeline drains.
    A stage's turn begins once what it waits for is there: what it has waited for since the pipeline was
    filled is no part of it. Of an interleaved pipeline the first ranks, filled last, are left out."""
    last = workload.expanded - 1
    if workload.unit > FILLED + 1:
        records = records[FILLED:]
    ends = [(one.tallies[last], one.tallies[last - workload.unit]) for one in records]
    if len(records) == 1:
        return [end.ready - begin.ready for end, begin in ends]
    return [end.start - begin.start for end, begin in ends]


def settled(workload: Workload, records: Sequence[Record], end: float) -> bool:
    """Whether the last turn took all ranks equally long: no rank runs ahead of another one any more."""
    last = lasted(workload, records)
    most = max(last) - min(last)
    return workload.repeats * most <= STEADY * (end + workload.repeats * mean(last))


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
