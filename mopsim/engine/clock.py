"""A clock of discrete events, as SimPy's Environment is one for processes and timeouts, without an object for
each event: a step has hundreds of thousands.
"""

from collections.abc import Callable, Generator
from contextlib import suppress
from heapq import heappop, heappush
from itertools import count

Wake = Callable[[], object]
Process = Generator[None, Wake, None]
"""Yields to wait until it is woken; the first time it is told by what, and begins."""


class Clock:
    """Wakes who waits when the time has come, of equal times in the order in which it was asked to.

    queue: (time, number, who is woken). overtaken: numbers of those who are not woken after all.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.queue: list[tuple[float, int, Wake]] = []
        self.numbers = count()
        self.overtaken: set[int] = set()

    def after(self, seconds: float, wake: Wake) -> int:
        """Wake in so many seconds. Returns the number under which it may be overtaken."""
        number = next(self.numbers)
        heappush(self.queue, (self.now + seconds, number, wake))
        return number

    def start(self, process: Process) -> None:
        """Let a process begin at the present time."""
        next(process)
        self.after(0.0, lambda: process.send(process.__next__))

    def run(self) -> None:
        """Let time pass until nobody waits for it."""
        queue, overtaken = self.queue, self.overtaken
        while queue:
            with suppress(StopIteration):  # a process has ended
                while queue:
                    self.now, number, wake = heappop(queue)
                    if number in overtaken:
                        overtaken.remove(number)
                    else:
                        wake()
