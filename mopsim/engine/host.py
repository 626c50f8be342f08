"""The host thread of a rank: it issues the program's ops kernel by kernel, ahead of the device where it can.

Issuing costs the same time for each kernel, and what else the host does is counted in such times. So between
two waits of the host the time of every op is known beforehand: the thread needs no events but at its waits.
"""

import simpy

from mopsim.program.workload import Op, Program, Work, on_host


class HostThread:
    """Times at which ops are issued. cost: seconds of the thread for each kernel.

    An op of n kernels may begin when the first is issued, and ends at the earliest one kernel's time after
    the last. After an op that it waits for the thread goes on when that op has ended.
    """

    def __init__(self, env: simpy.Environment, program: Program, cost: float) -> None:
        self.env = env
        self.kernels, beside = _kernels(program)
        self.first: list[float] = []
        """Seconds until the first kernel of each op is issued, without waits."""
        self.last: list[float] = []
        """Seconds until its last kernel is."""
        self.stretch: list[int] = []
        """Waits of the thread before each op."""
        issued, waits = 0.0, 0
        for op, kernels, more in zip(program.ops, self.kernels, beside, strict=True):
            self.first.append((issued + min(1.0, kernels)) * cost)
            issued += kernels + more
            self.last.append(issued * cost)
            self.stretch.append(waits)
            waits += self.waits(op)
        self.bases: list[float] = [0.0]
        """For each stretch between waits: the time at which the thread would have issued the first op."""
        self.events: dict[int, simpy.Event] = {}

    def knows(self, index: int) -> bool:
        """Whether the waits before op `index` are over, so that its time is known."""
        return self.stretch[index] < len(self.bases)

    def resumed(self, index: int) -> simpy.Event:
        """An event that fires when the waits before op `index` are over."""
        place = self.stretch[index]
        if place not in self.events:
            self.events[place] = self.env.event()
        return self.events[place]

    def begins(self, index: int) -> float:
        """Time at which the first kernel of an op is issued."""
        return self.bases[self.stretch[index]] + self.first[index]

    def waits(self, op: Op) -> bool:
        """Whether the thread waits for the end of an op before it issues the next one."""
        return op.awaited

    def ends(self, index: int, start: float, duration: float) -> float:
        """Time before which an op of `duration` seconds that began at `start` cannot end: its last kernel
        runs once it is issued."""
        kernels = self.kernels[index]
        apart = duration / kernels if kernels > 1.0 else duration
        return self.bases[self.stretch[index]] + self.last[index] + apart

    def resume(self, index: int) -> None:
        """The awaited op `index` has ended: the thread goes on."""
        place = self.stretch[index]
        assert len(self.bases) == place + 1, "an awaited op ended before one that is awaited earlier"
        self.bases.append(max(self.bases[place], self.env.now - self.last[index]))
        event = self.events.pop(place + 1, None)
        if event is not None:
            event.succeed()

    def leap(self, first: int, after: int, times: int, period: float) -> float:
        """Ops [first, after) are taken as repeated `times` times, each `period` seconds long for the device:
        the thread gets further ahead, or behind. Returns the seconds by which it falls behind in all."""
        place = self.stretch[after]
        if self.stretch[first] != place:
            return 0.0
        behind = times * (self.first[after] - self.first[first] - period)
        self.bases[place] += behind
        return behind


class BlockedThread(HostThread):
    """A thread that waits for every kernel that it has started (CUDA_LAUNCH_BLOCKING=1): nothing runs beside
    anything else, and between two kernels there is what the host does for the second.

    Ops that meet one of a peer are not waited for: the program itself says what comes after those.
    """

    def waits(self, op: Op) -> bool:
        return op.awaited or not op.rendezvous

    def ends(self, index: int, start: float, duration: float) -> float:
        return start + (self.last[index] - self.first[index]) + duration


def _kernels(program: Program) -> tuple[list[float], list[float]]:
    """Kernels of each op, one graph where they are replayed; and what the host does besides, in kernels'
    worth. Equal work is shared, so it is counted once."""
    counts: dict[tuple[int, bool], tuple[tuple[Work, ...], tuple[float, float]]] = {}
    found = []
    for op in program.ops:
        key = id(op.work), op.component in program.graphs
        if key not in counts:
            counts[key] = op.work, on_host(op.work, key[1])
        found.append(counts[key][1])
    return [issued for issued, _ in found], [more for _, more in found]
