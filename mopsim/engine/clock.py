"""SimPy's environment for the streams of a step, which has hundreds of thousands of events: each wakes a
generator itself. A SimPy Process is entered through three calls, and a Timeout has fields that nobody reads.
"""

from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

import simpy

Wake = Callable[[Any], None]
Process = Generator[None, Any, None]
"""Yields to wait until it is woken; the first time it is sent what wakes it, and begins."""


class Moment(simpy.Event):
    """An event at which one is woken, or nobody once it is overtaken."""

    _ok, _value = True, None

    def __init__(self, wake: Wake) -> None:
        self.callbacks = [wake]


class Clock(simpy.Environment):
    """Wakes who waits when the time has come, of equal times in the order in which it was asked to."""

    def after(self, seconds: float, wake: Wake) -> Moment:
        """Wake in so many seconds."""
        moment = Moment(wake)
        self.schedule(moment, delay=seconds)
        return moment

    def overtake(self, moment: Moment) -> None:
        """Wake nobody at that moment."""
        moment.callbacks = []

    def start(self, process: Process) -> None:
        """Let a process begin at the present time."""
        next(process)
        self.after(0.0, lambda moment: process.send(process.send))

    def play(self) -> None:
        """Let time pass until nobody waits for it."""
        while self._queue:
            with suppress(StopIteration):  # a process has ended
                self.run()
