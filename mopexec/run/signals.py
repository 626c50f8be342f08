"""Ending well: SIGINT, SIGTERM and SIGHUP ask for a stop after the running step."""

import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mopsim.common.command_line import REPEAT_SECONDS, fragile, ignore_signals
from mopsim.common.processes import kill_children


def end_on_interrupts() -> None:
    """SIGINT ends this process, a rank that the launcher started and speaks for: at once, whatever compiled
    code waits in, where Python's handler would not run."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


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
    stop, first = _Stop(error), 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        again = first and now > first + REPEAT_SECONDS and not kill_children()
        if again or not first:
            first = now
            stop.ask(number, frame)

    before = {
        number: signal.signal(number, note)
        for number in StopRequest.SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        with stop:
            yield
    finally:
        if first:
            ignore_signals(before)
        else:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Stop:
    """Raises the error of a signal, again where it was lost: an import or a finalizer drops what is raised in
    it, and a library may take any Exception for one of its own. What handles it holds it; then it waits."""

    LOOK_SECONDS, SOON_SECONDS = 0.5, 0.02

    def __init__(self, error: Callable[[signal.Signals], Exception]) -> None:
        self._error, self._number = error, 0
        self._raised: weakref.ref[Exception] | None = None

    def __enter__(self) -> None:
        self._report, self._alarm = sys.unraisablehook, signal.getsignal(signal.SIGALRM)
        sys.unraisablehook = self._lost

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self._report
        asked, self._number = self._number, 0  # first: an alarm that comes now arms no other one
        if asked:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._alarm)

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Raise the error of signal `number` at `frame`, or soon where it would be lost there."""
        self._number = number
        signal.signal(signal.SIGALRM, self._look)
        harm = fragile(frame)
        signal.setitimer(signal.ITIMER_REAL, self.SOON_SECONDS if harm else self.LOOK_SECONDS)
        if harm:
            return
        found = self._error(signal.Signals(number))
        self._raised = weakref.ref(found)
        try:
            raise found
        finally:
            del found  # its traceback holds this frame

    def _look(self, number: int, frame: FrameType | None) -> None:
        if not self._number:
            return
        if self._raised is None or self._raised() is None:
            self.ask(self._number, frame)
        else:
            signal.setitimer(signal.ITIMER_REAL, self.LOOK_SECONDS)

    def _lost(self, what: "sys.UnraisableHookArgs") -> None:
        if self._raised is None or what.exc_value is not self._raised():
            self._report(what)
