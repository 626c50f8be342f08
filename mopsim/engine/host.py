"""The host thread of a rank: it issues the program's ops kernel by kernel, ahead of the device where it can.

Issuing costs the same time for each kernel, and what else the host does is counted in such times. So between
two waits of the host the time of every op is known beforehand: the thread needs no events but at its waits.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from mopsim.engine.clock import Clock, Wake
from mopsim.program.workload import Program, on_host

Amounts = NDArray[np.float64]


class HostThread:
    """Times at which ops are issued. cost: seconds of the thread for each kernel.

    An op of n kernels may begin when the first is issued, and ends at the earliest one kernel's time after
    the last. After an op that it waits for the thread goes on when that op has ended.
    """

    blocked = False
    """Whether it waits for every kernel that it has started."""

    def __init__(self, clock: Clock, program: Program, durations: Sequence[float], cost: float) -> None:
        self.clock = clock
        kernels, beside = _kernels(program)
        self.awaited = self.waits(program)
        self.stretch = [0, *accumulate(self.awaited)]
        """Waits of the thread before each op."""
        issued = np.cumsum(kernels + beside)
        self.first: list[float] = ((np.append(0.0, issued[:-1]) + np.minimum(1.0, kernels)) * cost).tolist()
        """Seconds until the first kernel of each op is issued, without waits."""
        self.last: list[float] = (issued * cost).tolist()
        """Seconds until its last kernel is."""
        self.inside = self.last
        """The same, of a blocked thread from the start of the op."""
        self.apart = (durations / np.maximum(1.0, kernels)).tolist()
        """Seconds that its last kernel, which runs once it is issued, takes then."""
        self.bases: list[float] = [0.0]
        """For each stretch between waits: the time at which the thread would have issued the first op."""
        self.waiting: dict[int, list[Wake]] = {}

    def wait(self, index: int, wake: Wake) -> None:
        """Wake when the waits before op `index` are over, so that its time is known."""
        self.waiting.setdefault(self.stretch[index], []).append(wake)

    def waits(self, program: Program) -> list[bool]:
        """Whether the thread waits for the end of each op before it issues the next one."""
        return [op.awaited for op in program.ops]

    def resume(self, index: int) -> None:
        """The awaited op `index` has ended: the thread goes on."""
        place = self.stretch[index]
        assert len(self.bases) == place + 1, "an awaited op ended before one that is awaited earlier"
        self.bases.append(max(self.bases[place], self.clock.now - self.last[index]))
        for wake in self.waiting.pop(place + 1, ()):
            self.clock.wake(wake)

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

    blocked = True

    def __init__(self, clock: Clock, program: Program, durations: Sequence[float], cost: float) -> None:
        super().__init__(clock, program, durations, cost)
        self.inside = [last - first for first, last in zip(self.first, self.last, strict=True)]
        self.apart = list(durations)

    def waits(self, program: Program) -> list[bool]:
        return [op.awaited or not op.rendezvous for op in program.ops]


def _kernels(program: Program) -> tuple[Amounts, Amounts]:
    """Kernels of each op, one graph where they are replayed; and what the host does besides, in kernels'
    worth. Equal work is shared, so it is counted once."""
    graphs, alike = program.graphs, program.alike
    costs = [on_host(op.work, op.component in graphs) for op in alike.firsts]
    found = np.array(costs).reshape(-1, 2)[alike.kinds]
    return found[:, 0], found[:, 1]
