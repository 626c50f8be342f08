"""Ending well: SIGINT, SIGTERM and SIGHUP ask for a stop after the running step; no rank outlives the process
that started it.
"""

import ctypes
import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

_PR_SET_PDEATHSIG = 1


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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name


def end_with_parent() -> None:
    """Have the kernel end this process when its parent ends, however that happens (Linux; nothing
    elsewhere).
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended in between
        os._exit(1)
