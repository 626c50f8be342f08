"""SimPy streams: one process per stream and program, ops in issue order, as device streams run them.

A thread of the host issues the ops (see HostThread); no stream runs what is not issued yet.
"""

from collections import Counter
from collections.abc import Callable, Generator, Sequence

from mopsim.engine.beside import Beside
from mopsim.engine.clock import Clock, Process, Wake
from mopsim.engine.host import BlockedThread, HostThread
from mopsim.engine.links import Share, SharedLinks, Use
from mopsim.engine.queue import Order, Queue
from mopsim.engine.record import Record, turns
from mopsim.program.workload import FABRICS, TALKS, Op, Program, Repeat, first_compute


class Meeting:
    """Ops of different programs that start together: a send and its receive."""

    def __init__(self, clock: Clock, expected: int) -> None:
        self.clock, self.expected = clock, expected
        self.waiting: list[Wake] = []

    def arrive(self, wake: Wake) -> None:
        """All are woken once the last one is there."""
        self.waiting.append(wake)
        if len(self.waiting) == self.expected:
            for one in self.waiting:
                self.clock.wake(one)


class Rank:
    """One program in play: its streams, collectives that share links, and compute that slows while one of
    them runs beside it."""

    def __init__(
        self,
        clock: Clock,
        program: Program,
        durations: Sequence[float],
        record: Record,
        beside: Beside,
        uses: Use,
        meetings: dict[str, Meeting],
        host: HostThread | None,
        order: Order,
    ) -> None:
        self.clock, self.program, self.durations = clock, program, durations
        self.record, self.meetings, self.host = record, meetings, host
        self.repeats = {repeat.gap: repeat for repeat in program.repeats}
        record.issued, record.turns = [0.0] * len(program.ops), turns(program)
        self.done = [False] * len(program.ops)
        self.starts, self.ends = [0.0] * len(program.ops), [0.0] * len(program.ops)
        record.starts, record.ends = self.starts, self.ends
        self.moves = record.moves
        self.before = [-1] * len(program.ops)
        """The op that the same stream runs before each."""
        self.waiting: dict[int, list[Wake]] = {}
        self.links = SharedLinks(clock, program, uses)
        self.ran, self.shared = list(durations), dict[int, list[Share]]()
        """Seconds that each op ran; how those did that shared links."""
        self.beside, self.lost = beside, beside.share
        self.talking: list[Op] = []
        self.taking = 0
        """Of the collectives that run, those that spare products no SMs."""
        self.remaining, self.since = 0.0, 0.0
        self.wake: Wake | None = None
        """Of the compute that runs."""
        self.timer = -1
        """The event at which it is woken."""
        self.queue = Queue(clock, order)
        streams: dict[str, list[Op]] = {}
        before = self.before
        for op in program.ops:
            earlier = streams.get(op.stream)
            if earlier is None:
                streams[op.stream] = [op]
                continue
            before[op.index] = earlier[-1].index
            earlier.append(op)
        for name, ops in streams.items():
            clock.start(self.run(name, ops))

    def run(self, stream: str, ops: Sequence[Op]) -> Process:
        """The stream's ops in turn. Time passes at yields, and where nobody else is to be woken meanwhile."""
        wake = yield
        record, host, queue, moves, talking = self.record, self.host, self.queue, self.moves, self.talking
        starts, ends, done, waiting = self.starts, self.ends, self.done, self.waiting
        compute, durations, clock, now = stream == "compute", self.durations, self.clock, self.clock.now
        at, passes, turn_of, turn, ahead = clock.at, clock.passes, record.turns, None, queue.ahead
        (begin, end), issued_at, lasts = self.way(stream), record.issued, queue.lasts
        if host is not None:
            stretch, bases, awaited, repeats = host.stretch, host.bases, host.awaited, self.repeats
            first, inside, apart, blocked = host.first, host.inside, host.apart, host.blocked
        for op in ops:
            index, ready = op.index, now
            for dep in op.deps:
                if not done[dep]:
                    waiting.setdefault(dep, []).append(wake)
                    before, now = now, (yield)
                    if compute and now > before:
                        self.blame(op, dep, before, now)
            if host is not None:
                before = now
                if stretch[index] >= len(bases):
                    host.wait(index, wake)
                    now = yield
                issued = issued_at[index] = bases[stretch[index]] + first[index]
                if issued > now:
                    now = until if passes(until := now + (issued - now)) else (yield at(until, wake))
                if compute and now > before:
                    record.idle(op, now - before)
            if index in ahead or op.rendezvous:
                now = yield from self.turn(op, wake, now)
            start = starts[index] = now
            if host is not None and index in repeats:
                self.leap(repeats[index], host)
            if op.peak:
                moves.append(index)
            if index in lasts:
                now = yield from self.head(op, wake)
            if (duration := lasts.get(index, durations[index])) > 0.0:
                if not (talking or (self.wake and not compute)) and passes(until := now + duration):
                    now = until
                else:
                    now = yield begin(op, duration, wake)
                    end(op)
            if host is not None:
                late = (start if blocked else bases[stretch[index]]) + inside[index] + apart[index] - now
                if late > 0.0:
                    now = until if passes(until := now + late) else (yield at(until, wake))
                    record.held(op, late, compute)
                if awaited[index]:
                    host.resume(index)
            moves.append(~index)
            if compute:
                if turn_of[index] != turn:
                    turn = turn_of[index]
                    component = record.began(turn, ready, start)
                component[op.component] += op.times * (now - start)
            done[index], ends[index] = True, now
            for other in waiting.pop(index, ()):
                clock.wake(other)

    def turn(self, op: Op, wake: Wake, now: float) -> Generator[None, float, float]:
        """Wait until what was issued before, in one queue, has begun, and for the op's counterparts; returns
        the time."""
        index, queue = op.index, self.queue
        if index in queue.ahead:
            if queue.waits(index, wake):
                since, now = now, (yield)
                if op.stream == "compute" and now > since:
                    self.blame(op, queue.ahead[index], since, now)
            if index not in queue.lasts:
                queue.begin(index)
        return (yield from self.meet(op, wake, now)) if op.rendezvous else now

    def head(self, op: Op, wake: Wake) -> Generator[object, float, float]:
        """Run the op's kernels but the last, which frees the queue as it starts; returns the time."""
        begin, end = self.way(op.stream)
        now = yield begin(op, self.durations[op.index] - self.queue.lasts[op.index], wake)
        end(op)
        self.queue.begin(op.index)
        return now

    def meet(self, op: Op, wake: Wake, before: float) -> Generator[None, float, float]:
        """Wait for the op's counterparts of other programs; returns the time."""
        self.meetings[op.rendezvous].arrive(wake)
        now = yield
        if op.stream == "compute":
            self.record.waited(op, now - before)
            self.record.blame(op, op, now - before, "peers")
        return now

    def leap(self, repeat: Repeat, host: HostThread) -> None:
        """Layers in the place of an op are not played: the host gets ahead, or behind, as it would."""
        places = (repeat.first, repeat.gap + 1)
        first, after = (first_compute(self.program, place) for place in places)
        took = self.starts[repeat.gap] - self.starts[first]
        self.record.behind[repeat.gap] = host.leap(first, after, repeat.times, took)

    def blame(self, waiting: Op, index: int, since: float, until: float) -> None:
        """Book the compute stream's wait for op `index`, backwards in time: while that op ran, on it; before,
        on what it waited for itself. Where that was nothing of this rank: on its peers if they met,
        else on the host."""
        ops, record, ends = self.program.ops, self.record, self.ends
        record.waited(waiting, until - since)
        while until > since:
            op = ops[index]
            start = max(self.starts[index], since)
            late = min(until, max(self.starts[index] + self.ran[index], start))
            if until > late:
                record.blame(waiting, op, until - late, "host")
            if index in self.shared:
                self._book(waiting, index, start, late)
            else:
                record.blame(waiting, op, late - start)
            until = start
            if until <= since:
                return
            index = self._awaited(index)
            over = max(ends[index], since) if index >= 0 else since
            if until > over:
                record.blame(waiting, op, until - over, "peers" if op.rendezvous else "host")
            until = over

    def _awaited(self, index: int) -> int:
        """What an op waited for last: a dependency, or what its stream ran before; in one queue, what the one
        before it waited for, if that began later. -1: nothing."""
        ends, latest = self.ends, -1
        while index >= 0:
            earlier = (*self.program.ops[index].deps, self.before[index])
            found = max((one for one in earlier if one >= 0), key=ends.__getitem__, default=-1)
            if found >= 0 and (latest < 0 or ends[found] > ends[latest]):
                latest = found
            before = self.queue.ahead.get(index, -1)
            if before in self.queue.lasts and self.starts[before] < self.starts[index] < ends[before]:
                return before
            index = before
            if index < 0 or (latest >= 0 and self.starts[index] <= ends[latest]):
                return latest
        return latest

    def _book(self, waiting: Op, index: int, since: float, until: float) -> None:
        """Book a wait for op `index`, which shared its links, while it ran: what others took on them."""
        ops, record, shares, own = self.program.ops, self.record, self.shared[index], until - since
        for share, end in zip(shares, [*(one.since for one in shares[1:]), until], strict=False):
            lost = max(0.0, min(end, until) - max(share.since, since)) * (1.0 - share.rate)
            own -= lost
            for other in share.others:
                record.blame(waiting, ops[other], lost / len(share.others))
        record.blame(waiting, ops[index], own)

    def way(self, stream: str) -> tuple[Callable[[Op, float, Wake], object], Callable[[Op], object]]:
        """How ops of a stream begin and end."""
        if self.beside.most > 0.0 and stream == "compute":
            return self.compute, self.computed
        if stream in TALKS or stream in FABRICS:
            return self.talk, self.talked
        clock = self.clock
        return lambda op, duration, wake: clock.at(clock.now + duration, wake), lambda op: None

    def compute(self, op: Op, duration: float, wake: Wake) -> None:
        """Wake when `duration` seconds of undisturbed compute are done."""
        self.lost = self.beside.lost[op.index]
        self.remaining, self.since, self.wake = duration, self.clock.now, wake
        self._wake()

    def computed(self, op: Op) -> None:
        """They are."""
        if self.talking:
            self._settle()
        self.wake = None

    def talk(self, op: Op, duration: float, wake: Wake) -> None:
        """A collective begins: compute, and those that share its links, go on at new rates."""
        self._pause()
        self.talking.append(op)
        self.taking += op.index not in self.beside.sparing
        self._wake()
        self.links.begin(op.index, duration, wake)

    def talked(self, op: Op) -> None:
        """It has ended."""
        self._pause()
        self.talking.remove(op)
        self.taking -= op.index not in self.beside.sparing
        index, now, past = op.index, self.clock.now, self.links.end(op.index)
        if past or index in self.shared:
            self.ran[index] = now - self.starts[index]
            self.shared[index] = [*self.shared.get(index, ()), *past, Share(now, 1.0, ())]
        self._wake()

    def _pause(self) -> None:
        """Settle what the compute that runs has done, and do not wake it when that was thought to be all."""
        if self.wake is not None:
            self._settle()
            if self.timer >= 0 and (not self.talking or self._rate() > 0.0):
                self.clock.overtake(self.timer)

    def _settle(self) -> None:
        """Count what compute has done since the last change of its rate, and what a collective took of it."""
        now = self.clock.now
        passed, self.since = now - self.since, now
        if self.talking:
            rate = self._rate()
            self.remaining -= passed * rate
            for op in self.talking:
                self.record.stolen(op, passed * (1.0 - rate) / len(self.talking))
        else:
            self.remaining -= passed

    def _wake(self) -> None:
        """Wake the compute that runs when what remains is done at the present rate."""
        wake = self.wake
        if wake is None:
            return
        left = self.remaining if self.remaining > 0.0 else 0.0
        if not self.talking:
            self.timer = self.clock.at(self.clock.now + left, wake)
        elif (rate := self._rate()) > 0.0:
            self.timer = self.clock.at(self.clock.now + left / rate, wake)

    def _rate(self) -> float:
        """Of the compute that runs beside collectives."""
        return 1.0 - (self.lost if self.taking else self.beside.share)


def play(
    programs: Sequence[Program],
    durations: Sequence[Sequence[float]],
    records: Sequence[Record],
    besides: Sequence[Beside],
    uses: Sequence[Use],
    issue: float = 0.0,
    *,
    blocking: bool = False,
    orders: Sequence[Order] = (),
) -> float:
    """Run all programs to the end; returns the time at which the last op ended. issue: seconds of the host
    for each kernel; 0: it is never late. blocking: it waits for each kernel before it starts the next,
    however little that costs it. orders: of each program in one queue, if it is in one.

    Raises AssertionError that lists the ops left when none can go on: a deadlock in the program, never a
    user's mistake.
    """
    clock = Clock()
    parties = Counter(op.rendezvous for program in programs for op in program.ops if op.rendezvous)
    meetings = {key: Meeting(clock, count) for key, count in parties.items()}
    thread_of, plays = BlockedThread if blocking else HostThread, blocking or issue > 0.0
    threads = [
        thread_of(clock, program, times, issue) if plays and "step" not in program.graphs else None
        for program, times in zip(programs, durations, strict=True)
    ]
    ranks = [
        Rank(clock, program, times, record, beside, used, meetings, thread, order)
        for program, times, record, beside, used, thread, order in zip(
            programs,
            durations,
            records,
            besides,
            uses,
            threads,
            orders or [Order()] * len(programs),
            strict=True,
        )
    ]
    clock.play()
    late = ((one, op) for one in ranks if not all(one.done) for op in one.program.ops)
    left = [f"{one.program.stage}:{op.name}" for one, op in late if not one.done[op.index]]
    assert not left, f"deadlock: {len(left)} ops left, first {', '.join(left[:10])}"
    for rank in ranks:
        rank.record.ended(rank.program.ops)
    return max(record.end for record in records)  # now may be a time that was overtaken
