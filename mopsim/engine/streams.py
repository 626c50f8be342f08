"""SimPy streams: one process per stream and program, ops in issue order, as device streams run them.

A thread of the host issues the ops (see HostThread); no stream runs what is not issued yet.
"""

from collections import Counter
from collections.abc import Generator, Sequence
from typing import Any

import simpy

from mopsim.engine.host import BlockedThread, HostThread
from mopsim.engine.ledger import Ledger
from mopsim.engine.record import Record, turns
from mopsim.program.workload import Op, Program, Repeat, first_compute

Process = Generator[simpy.Event, Any, None]
COMMUNICATION = ("scale_up", "scale_out")


class Meeting:
    """Ops of different programs that start together: a send and its receive."""

    def __init__(self, env: simpy.Environment, expected: int) -> None:
        self.event, self.missing = env.event(), expected

    def arrive(self) -> simpy.Event:
        self.missing -= 1
        if self.missing == 0:
            self.event.succeed()
        return self.event


class Rank:
    """One program in play: its streams, its ledger, and compute that slows while a collective runs beside
    it."""

    def __init__(
        self,
        env: simpy.Environment,
        program: Program,
        durations: Sequence[float],
        ledger: Ledger,
        record: Record,
        share: float,
        meetings: dict[str, Meeting],
        host: HostThread | None,
    ) -> None:
        self.env, self.program, self.durations = env, program, durations
        self.ledger, self.record, self.meetings, self.host = ledger, record, meetings, host
        self.repeats = {repeat.gap: repeat for repeat in program.repeats}
        record.issued, record.turns = [0.0] * len(program.ops), turns(program)
        self.done = [False] * len(program.ops)
        self.starts, self.ends = [0.0] * len(program.ops), [0.0] * len(program.ops)
        record.starts, record.ends = self.starts, self.ends
        self.before = [-1] * len(program.ops)
        """The op that the same stream runs before each."""
        self.waiting: dict[int, simpy.Event] = {}
        self.share = share
        self.talking: list[Op] = []
        self.remaining, self.since = 0.0, 0.0
        self.finish: simpy.Event | None = None
        streams: dict[str, list[Op]] = {}
        for op in program.ops:
            earlier = streams.setdefault(op.stream, [])
            self.before[op.index] = earlier[-1].index if earlier else -1
            earlier.append(op)
        for name, ops in streams.items():
            env.process(self.run(name, ops))

    def run(self, stream: str, ops: Sequence[Op]) -> Process:
        """Issue the stream's ops one after the other. Time passes at yields only, so `now` is read there."""
        env, done, record, ledger, host = self.env, self.done, self.record, self.ledger, self.host
        compute, talks = stream == "compute", stream in COMMUNICATION
        shares, durations, now = self.share > 0.0, self.durations, self.env.now
        for op in ops:
            index, ready = op.index, now
            for dep in op.deps:
                if not done[dep]:
                    yield self.wait_for(dep)
                    before, now = now, env.now
                    if compute and now > before:
                        record.waited(op, now - before)
                        self.blame(op, dep, before, now)
            if host is not None:
                before = now
                if not host.knows(index):
                    yield host.resumed(index)
                    now = env.now
                issued = record.issued[index] = host.begins(index)
                if issued > now:
                    yield env.timeout(issued - now)
                    now = env.now
                if compute and now > before:
                    record.idle(op, now - before)
            if op.rendezvous:
                before = now
                yield self.meetings[op.rendezvous].arrive()
                now = env.now
                if compute:
                    record.waited(op, now - before)
                    record.blame(op, op, now - before, "peers")
            start = self.starts[index] = now
            if host is not None and index in self.repeats:
                self.leap(self.repeats[index], host)
            ledger.start(op, start)
            duration = durations[index]
            if duration > 0.0:
                if compute and shares:
                    yield self.compute(duration)
                    self._finished()
                elif talks and shares:
                    self.communicate(op, begins=True)
                    yield env.timeout(duration)
                    self.communicate(op, begins=False)
                else:
                    yield env.timeout(duration)
                now = env.now
            if host is not None:
                late = host.ends(index, start, duration) - now
                if late > 0.0:
                    yield env.timeout(late)
                    now = env.now
                    if compute:
                        record.held(op, late)
                if host.waits(op):
                    host.resume(index)
            ledger.end(op, now)
            record.ended(op, ready, start, now, compute)
            self.over(index, now)

    def over(self, index: int, now: float) -> None:
        """An op has ended: who waits for it goes on."""
        self.done[index], self.ends[index] = True, now
        event = self.waiting.pop(index, None)
        if event is not None:
            event.succeed()

    def leap(self, repeat: Repeat, host: HostThread) -> None:
        """Layers in the place of an op are not played: the host gets ahead, or behind, as it would."""
        places = (repeat.first, repeat.gap + 1)
        first, after = (first_compute(self.program, place) for place in places)
        took = self.starts[repeat.gap] - self.starts[first]
        self.record.behind[repeat.gap] = host.leap(first, after, repeat.times, took)

    def wait_for(self, index: int) -> simpy.Event:
        event = self.waiting.get(index)
        if event is None:
            event = self.waiting[index] = self.env.event()
        return event

    def compute(self, duration: float) -> simpy.Event:
        """An event that fires when `duration` seconds of undisturbed compute are done."""
        self.remaining, self.since = duration, self.env.now
        self.finish = self._timer()
        return self.finish

    def _finished(self) -> None:
        self._settle()
        self.finish = None

    def blame(self, waiting: Op, index: int, since: float, until: float) -> None:
        """Book the compute stream's wait for op `index`, backwards in time: while that op ran, on it; before,
        on what it waited for itself. Where that was nothing of this rank: on its peers if they met,
        else on the host."""
        ops, record, ends = self.program.ops, self.record, self.ends
        while until > since:
            op = ops[index]
            start = max(self.starts[index], since)
            late = min(until, max(self.starts[index] + self.durations[index], start))
            record.blame(waiting, op, until - late, "host")
            record.blame(waiting, op, late - start)
            until = start
            earlier = (*op.deps, self.before[index]) if self.before[index] >= 0 else op.deps
            index = max(earlier, key=ends.__getitem__, default=-1)
            over = max(ends[index], since) if index >= 0 else since
            record.blame(waiting, op, until - over, "peers" if op.rendezvous else "host")
            until = over

    def communicate(self, op: Op, *, begins: bool) -> None:
        """A collective begins or ends: settle what compute has done, then go on at the new rate."""
        running = self.finish
        if running is not None:
            self._settle()
        if begins:
            self.talking.append(op)
        else:
            self.talking.remove(op)
        if running is not None and running.callbacks:  # who waits for the old timer waits for the new one
            self.finish = self._timer()
            self.finish.callbacks, running.callbacks = running.callbacks, []

    def _settle(self) -> None:
        """Count what compute has done since the last change of its rate, and what a collective took of it."""
        passed, rate = self.env.now - self.since, self._rate()
        self.remaining -= passed * rate
        self.since = self.env.now
        if self.talking:
            self.record.stolen(self.talking[0], passed * (1.0 - rate))

    def _rate(self) -> float:
        return 1.0 - self.share if self.talking else 1.0

    def _timer(self) -> simpy.Event:
        """Fires when what remains is done at the present rate."""
        rate = self._rate()
        return self.env.timeout(max(0.0, self.remaining) / rate) if rate > 0.0 else self.env.event()


def play(
    programs: Sequence[Program],
    durations: Sequence[Sequence[float]],
    ledgers: Sequence[Ledger],
    records: Sequence[Record],
    share: float,
    issue: float = 0.0,
    *,
    blocking: bool = False,
) -> float:
    """Run all programs to the end; returns the time at which the last op ended. issue: seconds of the host
    for each kernel; 0: it is never late. blocking: it waits for each kernel before it starts the next,
    however little that costs it.

    Raises AssertionError that lists the ops left when none can go on: a deadlock in the program, never a
    user's mistake.
    """
    env = simpy.Environment()
    parties = Counter(op.rendezvous for program in programs for op in program.ops if op.rendezvous)
    meetings = {key: Meeting(env, count) for key, count in parties.items()}
    thread_of, plays = BlockedThread if blocking else HostThread, blocking or issue > 0.0
    threads = [
        thread_of(env, program, issue) if plays and "step" not in program.graphs else None
        for program in programs
    ]
    ranks = [
        Rank(env, program, times, ledger, record, share, meetings, thread)
        for program, times, ledger, record, thread in zip(
            programs, durations, ledgers, records, threads, strict=True
        )
    ]
    env.run()
    rest = ((rank, op) for rank in ranks for op in rank.program.ops if not rank.done[op.index])
    left = [f"{rank.program.stage}:{op.name}" for rank, op in rest]
    assert not left, f"deadlock: {len(left)} ops left, first {', '.join(left[:10])}"
    return max(record.end for record in records)  # env.now may be a timer that was overtaken
