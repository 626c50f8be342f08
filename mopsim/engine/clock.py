"""SimPy's environment for the streams of a step, which has hundreds of thousands of events: each wakes a
generator itself. A SimPy Process is entered through three calls, a Timeout has fields that nobody reads, and
every event would be another object: here one that waits has one Event, which is scheduled again and again.
"""

from collections import deque
from collections.abc import Callable, Generator
from heapq import heappop, heappush
from typing import Any, cast

import simpy
from simpy.events import NORMAL

Process = Generator[Any, Any, None]
"""Yields, whatever it is, to wait until it is woken; the first time it is sent what wakes it, and begins.
Then it is sent the time."""


class Wake(simpy.Event):
    """What wakes one that waits: it is called with the time."""

    _ok, _value = True, None

    def __init__(self, call: Callable[[float], object]) -> None:
        self.call = call


class Clock(simpy.Environment):
    """Wakes who waits when the time has come, of equal times in the order in which it was asked to.

    Whoever asks to be woken later than all others that wait need not be: it lets the time pass itself
    (`passes`). Those to be woken at the present time (`soon`) are in order as they come.
    """

    now: float = 0.0
    """The present time; of SimPy a property, asked for hundreds of thousands of times."""

    def __init__(self) -> None:
        super().__init__()
        self.overtaken: set[int] = set()
        self.soon: deque[tuple[float, int, int, Wake]] = deque()
        self.queue = cast(list[tuple[float, int, int, Wake]], self._queue)

    def at(self, time: float, wake: Wake) -> int:
        """Wake at that time; returns the number of the event."""
        number = next(self._eid)
        heappush(self.queue, (time, NORMAL, number, wake))
        return number

    def wake(self, wake: Wake) -> None:
        """Wake now, after those that were to be woken before."""
        self.soon.append((self.now, NORMAL, next(self._eid), wake))

    def passes(self, time: float) -> bool:
        """Let time pass until then, if nobody is to be woken by then: an event of its own."""
        if self.soon or (self.queue and self.queue[0][0] <= time):
            return False
        self.now = time
        next(self._eid)
        return True

    def overtake(self, number: int) -> None:
        """Wake nobody at that event."""
        self.overtaken.add(number)

    def start(self, process: Process) -> None:
        """Let a process begin at the present time."""
        next(process)
        wake = Wake(process.send)
        self.wake(Wake(lambda now: process.send(wake)))

    def play(self) -> int:
        """Let time pass until nobody waits for it; returns how many events there were."""
        queue, soon, overtaken = self.queue, self.soon, self.overtaken
        while queue or soon:
            if soon and not (queue and queue[0] < soon[0]):
                wake = soon.popleft()[3]
            else:
                self.now, _, number, wake = heappop(queue)
                if number in overtaken:
                    continue
            try:
                wake.call(self.now)
            except StopIteration:  # a process has ended
                continue
        return next(self._eid)
