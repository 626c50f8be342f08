"""SimPy streams: one process per stream and program, ops in issue order, as device streams run them.

A thread of the host issues the ops (see HostThread); no stream runs what is not issued yet.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any

import simpy

from mopsim.engine.host import HostThread
from mopsim.engine.ledger import Ledger
from mopsim.engine.record import Record
from mopsim.lowering.workload import Op, Program

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
        self.env, self.program, self.durations, self.ledger, self.record = (
            env,
            program,
            durations,
            ledger,
            record,
        )
        self.meetings, self.host = meetings, host
        self.done = [False] * len(program.ops)
        self.waiting: dict[int, simpy.Event] = {}
        self.share, self.talking = share, 0
        self.remaining, self.since, self.version = 0.0, 0.0, 0
        self.finish: simpy.Event | None = None
        streams: dict[str, list[Op]] = {}
        for op in program.ops:
            streams.setdefault(op.stream, []).append(op)
        for name, ops in streams.items():
            env.process(self.run(name, ops))

    def run(self, stream: str, ops: Sequence[Op]) -> Process:
        """Issue the stream's ops one after the other."""
        env, done, record, ledger, host = self.env, self.done, self.record, self.ledger, self.host
        compute, talks = stream == "compute", stream in COMMUNICATION
        for op in ops:
            ready = env.now
            for dep in op.deps:
                if not done[dep]:
                    before = env.now
                    yield self.wait_for(dep)
                    if compute:
                        record.waited(op, self.program.ops[dep], env.now - before)
            if host is not None:
                before = env.now
                if not host.knows(op.index):
                    yield host.resumed(op.index)
                late = host.begins(op.index) - env.now
                if late > 0.0:
                    yield env.timeout(late)
                if compute:
                    record.idle(op, env.now - before)
            if op.rendezvous:
                before = env.now
                yield self.meetings[op.rendezvous].arrive()
                if compute:
                    record.waited(op, op, env.now - before)
            start = env.now
            ledger.start(op, start)
            duration = self.durations[op.index]
            if duration > 0.0:
                if compute and self.share > 0.0:
                    yield self.compute(duration)
                elif talks and self.share > 0.0:
                    self.communicate(+1, op)
                    yield env.timeout(duration)
                    self.communicate(-1, op)
                else:
                    yield env.timeout(duration)
            if host is not None:
                late = host.ends(op.index, duration) - env.now
                if late > 0.0:
                    yield env.timeout(late)
                    if compute:
                        record.held(op, late)
                if op.awaited:
                    host.resume(op.index)
            ledger.end(op, env.now)
            record.ended(op, ready, start, env.now, compute)
            done[op.index] = True
            event = self.waiting.pop(op.index, None)
            if event is not None:
                event.succeed()

    def wait_for(self, index: int) -> simpy.Event:
        event = self.waiting.get(index)
        if event is None:
            event = self.waiting[index] = self.env.event()
        return event

    def compute(self, duration: float) -> simpy.Event:
        """An event that fires when `duration` seconds of undisturbed compute are done."""
        self.remaining, self.since = duration, self.env.now
        self.finish = self.env.event()
        self._schedule()
        return self.finish

    def communicate(self, change: int, op: Op) -> None:
        """A collective begins or ends: settle what compute has done, then go on at the new rate."""
        if self.finish is not None:
            passed = self.env.now - self.since
            rate = self._rate()
            self.remaining -= passed * rate
            self.since = self.env.now
            if rate < 1.0:
                self.record.stolen(op, passed * (1.0 - rate))
        self.talking += change
        if self.finish is not None:
            self._schedule()

    def _rate(self) -> float:
        return 1.0 - self.share if self.talking else 1.0

    def _schedule(self) -> None:
        self.version += 1
        rate = self._rate()
        if rate <= 0.0:
            return
        timer = self.env.timeout(max(0.0, self.remaining) / rate)
        assert timer.callbacks is not None
        timer.callbacks.append(self._timer(self.version))

    def _timer(self, version: int) -> Callable[[simpy.Event], None]:
        def fire(_: simpy.Event) -> None:
            if version == self.version and self.finish is not None:
                event, self.finish = self.finish, None
                self.remaining = 0.0
                event.succeed()

        return fire


def play(
    programs: Sequence[Program],
    durations: Sequence[Sequence[float]],
    ledgers: Sequence[Ledger],
    records: Sequence[Record],
    share: float,
    issue: float = 0.0,
) -> float:
    """Run all programs to the end; returns the time at which the last op ended. issue: seconds of the host
    for each kernel; 0: it is never late.

    Raises AssertionError that lists the ops left when none can go on: a deadlock in the lowering, never a
    user's mistake.
    """
    env = simpy.Environment()
    parties: dict[str, int] = {}
    for program in programs:
        for op in program.ops:
            if op.rendezvous:
                parties[op.rendezvous] = parties.get(op.rendezvous, 0) + 1
    meetings = {key: Meeting(env, count) for key, count in parties.items()}
    threads = [
        HostThread(env, program, issue) if issue > 0.0 and "step" not in program.graphs else None
        for program in programs
    ]
    ranks = [
        Rank(env, program, times, ledger, record, share, meetings, thread)
        for program, times, ledger, record, thread in zip(
            programs, durations, ledgers, records, threads, strict=True
        )
    ]
    env.run()
    left = [
        f"{rank.program.stage}:{op.name}"
        for rank in ranks
        for op in rank.program.ops
        if not rank.done[op.index]
    ]
    assert not left, f"deadlock: {len(left)} ops left, first {', '.join(left[:10])}"
    return max(record.end for record in records)  # env.now may be a timer that was overtaken
