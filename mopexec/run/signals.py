"""Ending well: SIGINT, SIGTERM and SIGHUP ask for a stop after the running step."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mopsim.common.command_line import REPEAT_SECONDS, ignore_signals
from mopsim.common.processes import kill_children


class StopRequest:
    """While entered, SIGNALS set `signal_name` instead of ending the process; what nohup ignores stays so."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.signal_name = ""
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return bool(self.signal_name)

    def __enter__(self) -> "StopRequest":
        for number in self.SIGNALS:
            if signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name


@contextmanager
def one_stop(error: Callable[[signal.Signals], Exception]) -> Iterator[None]:
    """Around the agent that waits for the ranks: the first of StopRequest.SIGNALS raises `error` of it. More
    within REPEAT_SECONDS are the same wish; a later one has the ranks ended at once. After a stop SIGNALS are
    ignored, for the command ends."""
    first = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        again = first and now > first + REPEAT_SECONDS and not kill_children()
        if again or not first:  # again: the error was lost before there was a rank
            first = now
            raise error(signal.Signals(number))

    before = {
        number: signal.signal(number, note)
        for number in StopRequest.SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        if first:
            ignore_signals(before)
        else:
            for number, handler in before.items():
                signal.signal(number, handler)
