"""What a rank issues in order, priced: how long passes take at least, one alone or two woven, and the memory
that they need."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from mopsim.cost import seconds
from mopsim.cost.beside import lost
from mopsim.graph.tape import Step
from mopsim.program.builder import turn_ends
from mopsim.program.host_time import Around, hosted
from mopsim.program.template import Template
from mopsim.program.workload import FABRICS, NUM_DEVICE_SLOTS, STREAMS, TALKS, Op, Work, deltas, on_host
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.stack import Stack

LEAST = 1e-3
"""Of its rate, what compute keeps beside a collective that takes all of it: it goes on after it."""
COMPUTE = STREAMS.index("compute")
UP, OUT = (
    frozenset(place for place, name in enumerate(STREAMS) if TALKS.get(name, name) == fabric)
    for fabric in FABRICS
)


@dataclass(frozen=True)
class Alone:
    """Ops that have all streams to themselves, each in the order of issue.

    chain: seconds from the first op on the compute stream to the end of the last one, what comes before it
    over; paced: the same where the host starts their kernels, as ahead of them as it was at the end of a pass
    before; busy: those in which that stream computes; up, out: those in which each fabric is busy; height:
    device bytes above the start, at least.
    """

    chain: float
    paced: float
    busy: float
    up: float
    out: float
    height: int

    @property
    def talks(self) -> float:
        """Seconds in which the busier fabric is busy."""
        return max(self.up, self.out)


class Issue(NamedTuple):
    """What the host takes for an op. first, whole: seconds until it has started the first kernel, and all;
    last: those that the last kernel takes then; awaited: it waits for the op before it goes on."""

    first: float
    whole: float
    last: float
    awaited: bool


class Busy(NamedTuple):
    """Seconds of the compute stream: all, and those of experts."""

    all: float
    routed: float


@dataclass(frozen=True)
class Priced:
    """A template: of each op its stream, its seconds, the ops in here that it waits for, whether it waits for
    what comes before, and its change of memory at its height and at its end, device bytes. turns: whether
    each ends a turn. first: place and memory of the first op on the compute stream, with what comes before
    it; latest: place of the last one, -1 without; rest: what comes after it. slowed: seconds of that stream
    where a collective always runs beside; hosts: what the host takes for each.
    """

    streams: tuple[int, ...]
    times: tuple[float, ...]
    deps: tuple[tuple[tuple[int, ...], bool], ...]
    heights: tuple[int, ...]
    lefts: tuple[int, ...]
    turns: tuple[bool, ...]
    ends: tuple[int, ...]
    first: tuple[int, tuple[Step, ...]]
    latest: int
    rest: tuple[Step, ...]
    slowed: float
    hosts: tuple[Issue, ...]

    @property
    def issued(self) -> float:
        """Seconds of the host."""
        return sum(one.whole for one in self.hosts)

    def seconds(self, start: int, stop: int) -> Alone:
        """Of its ops from place `start` to `stop`, what comes before them over; their memory is not known."""
        flow = Flow()
        flow.streams += self.streams[start:stop]
        flow.seconds += self.times[start:stop]
        flow.deps += [
            tuple([dep - start for dep in deps if dep >= start]) for deps, _ in self.deps[start:stop]
        ]
        flow.turns += self.turns[start:stop]
        flow.hosts += self.hosts[start:stop]
        flow.height, flow.left = [0] * (stop - start), [0] * (stop - start)
        return alone(flow)


@dataclass
class Prices:
    """Of templates on one machine, under one stack: equal work is one object, priced once."""

    machine: HardwareProfile
    stack: Stack
    known: dict[int, tuple[Work, float]] = field(default_factory=dict)

    def of(self, template: Template, around: Around | None = None) -> Priced:
        """around: of a pass of a layer, whose modules take the host's time too."""
        first, latest, pending = (-1, tuple[Step, ...]()), -1, tuple[Step, ...]()
        memory, slowed = list[tuple[int, int]](), 0.0
        pieces = template.pieces
        seconds = [self._seconds(piece) for piece in pieces]
        for place, (piece, took) in enumerate(zip(pieces, seconds, strict=True)):
            pending += template.before.get(place, ())
            steps = template.memory[place]
            compute = piece.stream == "compute"
            if compute:
                steps, pending = (*pending, *steps), ()
                slowed += took / max(1 - self._lost(piece), LEAST)
                first, latest = first if first[0] >= 0 else (place, steps), place
            memory.append(device_bytes(steps))
        pending += template.before.get(len(memory), ())
        deps = [
            (tuple([dep for dep in one.deps if dep >= 0]), min(one.deps, default=0) < 0) for one in pieces
        ]
        heights, lefts = zip(*memory, strict=True) if memory else ((), ())
        hosts = self._hosts(pieces, seconds, around)
        return Priced(
            tuple([STREAMS.index(one.stream) for one in pieces]), tuple(seconds), tuple(deps), heights, lefts,
            tuple(turn_ends(pieces)), template.ends, first, latest, pending, slowed, hosts,
        )  # fmt: skip

    def compute(self, template: Template) -> Busy:
        """Seconds of a template's compute stream."""
        busy = routed = 0.0
        for piece in template.pieces:
            if piece.stream == "compute":
                took = self._seconds(piece)
                busy += took
                routed += took if piece.component == "experts" else 0.0
        return Busy(busy, routed)

    def _hosts(self, pieces: Sequence[Op], took: Sequence[float], around: Around | None) -> tuple[Issue, ...]:
        """What the host takes for each piece. took: seconds of the device."""
        if around and self.stack.host.modules:
            pieces = hosted(pieces, range(len(pieces)), self.stack, around)
        graphs, launch, found = self.stack.host.graphs, self.launch, []
        for piece, time in zip(pieces, took, strict=True):
            kernels, beside = on_host(piece.work, piece.component in graphs)
            first, whole = min(1.0, kernels) * launch, (kernels + beside) * launch
            found.append(Issue(first, whole, time / max(1.0, kernels), piece.awaited))
        return tuple(found)

    @property
    def launch(self) -> float:
        """Seconds in which the host starts a kernel; 0 where it starts a step as one."""
        issue = self.machine.host.cpu_launch_time
        return issue.si if issue and "step" not in self.stack.host.graphs else 0.0

    def _lost(self, piece: Op) -> float:
        return lost([self.known[id(work)] for work in piece.work], self.machine, self.stack)

    def _seconds(self, piece: Op) -> float:
        took = 0.0
        for work in piece.work:
            priced = self.known.get(id(work))
            if priced is None:
                priced = self.known[id(work)] = (work, seconds(work, self.machine))
            took += priced[1]
        return took


class Flow:
    """Templates played one after the other. streams, seconds, deps, turns, hosts: of each op, in the order of
    issue, what it waits for in here, whether it ends a turn, and what the host takes for it. height, left:
    device bytes that an op of the compute stream has above its start, and leaves; before: those that change
    before the first one.

    What other streams do to the memory counts as if bytes were freed as soon as they may be, and taken when
    an op of the compute stream waits for them (`settled`).
    """

    def __init__(self) -> None:
        self.streams: list[int] = []
        self.seconds: list[float] = []
        self.deps: list[tuple[int, ...]] = []
        self.turns: list[bool] = []
        self.hosts: list[Issue] = []
        self.height: list[int] = []
        self.left: list[int] = []
        self.before = 0
        self._latest = -1
        self._steps: tuple[Step, ...] = ()
        self._ends: tuple[int, ...] = ()

    def hold(self, size: int) -> "Flow":
        """Bytes that are there from the next op on the compute stream on."""
        self._steps += (("activations", size),)
        return self

    def free(self, size: int) -> "Flow":
        """Bytes that are gone once the latest op on the compute stream is over."""
        if self._latest < 0:
            self.before -= size
        else:
            self.left[self._latest] -= size
        return self

    def play(self, priced: Priced) -> "Flow":
        by, start = len(self.streams), self._ends
        self.streams += priced.streams
        self.seconds += priced.times
        self.deps += [
            (*[dep + by for dep in deps], *start) if waits else tuple([dep + by for dep in deps])
            for deps, waits in priced.deps
        ]
        self.height += priced.heights
        self.left += priced.lefts
        self.turns += priced.turns
        self.hosts += priced.hosts
        place, steps = priced.first
        if place >= 0:
            self._latest = by + priced.latest
            self.height[by + place], self.left[by + place] = device_bytes((*self._steps, *steps))
            self._steps = ()
        self._steps += priced.rest
        self._ends = tuple(by + end for end in priced.ends) if priced.streams else start
        return self

    def settled(self) -> "Flow":
        """With what the other streams do to the memory, and what comes after all, in the compute stream's
        ops."""
        root, taken = [-1] * len(self.streams), [0] * len(self.streams)
        for place, stream in enumerate(self.streams):
            if stream == COMPUTE:
                root[place] = place
                for dep in self.deps[place]:
                    self.height[place] += taken[dep]
                    self.left[place] += taken[dep]
                    taken[dep] = 0
                continue
            freed = min(self.left[place], 0)
            taken[place] = self.left[place] - freed
            root[place] = max((root[dep] for dep in self.deps[place]), default=-1)
            if root[place] < 0:
                self.before += freed
            else:
                self.left[root[place]] += freed
        return self.free(-min(device_bytes(self._steps)[1], 0))


def alone(*flows: Flow) -> Alone:
    """One pass, or a backward and a forward by turns (`turn_ends`), as
    `mopsim.program.builder.Builder.weave` issues them."""
    last = [-1.0] * len(STREAMS)
    ends = [[0.0] * len(flow.streams) for flow in flows]
    paced = [[0.0] * len(flow.streams) for flow in flows]
    places = [0] * len(flows)
    busy = up = out = 0.0
    held = sum(flow.before for flow in flows)
    top, going, rows = max(held, 0), True, list[Row]()
    while going:
        going = False
        for which, flow in enumerate(flows):
            streams, took, deps, done = flow.streams, flow.seconds, flow.deps, ends[which]
            turns, height, left, hosts = flow.turns, flow.height, flow.left, flow.hosts
            later = paced[which]
            place, count = places[which], len(streams)
            while place < count:
                stream, time = streams[place], took[place]
                start = last[stream]
                waits = deps[place]
                for dep in waits:
                    if done[dep] > start:
                        start = done[dep]
                if stream == COMPUTE:
                    start = start if start > 0.0 else 0.0
                    busy += time
                    high = held + height[place]
                    top = high if high > top else top
                    held += left[place]
                done[place] = last[stream] = start + time if start >= 0 else -1.0
                rows.append((later, place, stream, waits, time, hosts[place]))
                place += 1
                if stream in UP:
                    up += time
                elif stream in OUT:
                    out += time
                if turns[place - 1]:
                    break
            places[which] = place
            going = going or place < count
    chain = max(last[COMPUTE], 0.0)
    issued = any(one.whole for flow in flows for one in flow.hosts)
    return Alone(chain, _paced(rows) if issued else chain, busy, up, out, top)


Row = tuple[list[float], int, int, tuple[int, ...], float, Issue]
"""An op as it is issued: the ends of its pass, its place there, its stream, what it waits for, its seconds,
and what the host takes for it."""


def _paced(rows: Sequence[Row]) -> float:
    """Seconds of passes whose ops the host starts in this order, as mopsim.engine.host does: of a second
    time, in which it is as far ahead of them as it was after the first."""
    end = ahead = 0.0
    for _ in range(2):
        clock, last = -ahead, [-1.0] * len(STREAMS)
        for done, place, stream, deps, took, (first, whole, lasts, awaited) in rows:
            start = last[stream]
            for dep in deps:
                if done[dep] > start:
                    start = done[dep]
            if stream == COMPUTE and start < 0.0:
                start = 0.0
            begin, clock = clock + first, clock + whole
            over = -1.0
            if start >= 0.0:
                over, late = (start if start > begin else begin) + took, clock + lasts
                over = late if late > over else over
            done[place] = last[stream] = over
            if awaited and over > clock:
                clock = over
        end = max(last[COMPUTE], 0.0)
        ahead = end - clock
    return end


def device_bytes(steps: Iterable[Step]) -> tuple[int, int]:
    """(at the height, at the end) of a memory script on the device."""
    return _device_bytes(tuple(steps))


@lru_cache(maxsize=65536)
def _device_bytes(steps: tuple[Step, ...]) -> tuple[int, int]:
    height, left = deltas(steps)
    return _device(height), _device(left)


def _device(changes: Sequence[tuple[int, int]]) -> int:
    return sum(size for slot, size in changes if slot < NUM_DEVICE_SLOTS)
