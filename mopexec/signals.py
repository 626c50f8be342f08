"""Ending well: SIGINT, SIGTERM and SIGHUP ask for a stop after the running step."""

import signal
from types import FrameType, TracebackType
from typing import Any


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
