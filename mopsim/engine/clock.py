"""SimPy's environment for the streams of a step, which has hundreds of thousands of events: each wakes a
generator itself. A SimPy Process is entered through three calls, a Timeout has fields that nobody reads, and
every event would be another object: here one that waits has one Event, which is scheduled again and again.
"""

from collections.abc import Callable, Generator
from heapq import heappop, heappush
from typing import Any, cast

import simpy
from simpy.events import NORMAL

Process = Generator[None, Any, None]
"""Yields to wait until it is woken; the first time it is sent what wakes it, and begins. Then it is sent the
time."""


class Wake(simpy.Event):
    """What wakes one that waits: it is called with the time."""

    _ok, _value = True, None

    def __init__(self, call: Callable[[float], object]) -> None:
        self.call = call


class Clock(simpy.Environment):
    """Wakes who waits when the time has come, of equal times in the order in which it was asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.overtaken: set[int] = set()

    def after(self, seconds: float, wake: Wake) -> int:
        """Wake in so many seconds; returns the number of the event."""
        number = next(self._eid)
        heappush(self._queue, (self._now + seconds, NORMAL, number, wake))
        return number

    def overtake(self, number: int) -> None:
        """Wake nobody at that event."""
        self.overtaken.add(number)

    def start(self, process: Process) -> None:
        """Let a process begin at the present time."""
        next(process)
        wake = Wake(process.send)
        self.after(0.0, Wake(lambda now: process.send(wake)))

    def play(self) -> int:
        """Let time pass until nobody waits for it; returns how many events there were."""
        queue, overtaken = cast(list[tuple[float, int, int, Wake]], self._queue), self.overtaken
        while queue:
            self._now, _, number, wake = heappop(queue)
            if number in overtaken:
                continue
            try:
                wake.call(self._now)
            except StopIteration:  # a process has ended
                continue
        return next(self._eid)
