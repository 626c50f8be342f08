"""The stop that a signal asks for reaches whoever waits for the ranks, whatever runs as it comes."""

import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mopexec.run.signals import StopRequest, one_stop


class Stop(Exception):  # noqa: N818
    """As torch's SignalException: any `except Exception` takes it."""


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """one_stop leaves signals ignored after a stop: its command ends."""
    kinds = (*StopRequest.SIGNALS, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in kinds}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def asked() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)


def swallowed() -> None:
    with suppress(Exception):
        asked()


class Finalized:
    def __del__(self) -> None:
        asked()


def finalized() -> None:
    one = Finalized()
    del one


def imported() -> None:
    importlib.import_module("imported_while_stopped")


def wait_for_ranks(first: Callable[[], None]) -> None:
    """What the agent does: without a stop it does not end."""
    with one_stop(lambda number: Stop(number.name)):
        first()
        time.sleep(20)


@pytest.mark.parametrize("lose", [swallowed, finalized])
def test_a_stop_that_is_lost_comes_again(
    lose: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Stop, match="SIGTERM"):
        wait_for_ranks(lose)
    assert capsys.readouterr().err == ""


def test_a_stop_in_an_import_comes_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that is cut short is broken for whoever imports it next; a compiled one loses the error."""
    text = "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(0.2)\n"
    (tmp_path / "imported_while_stopped.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(Stop):
        wait_for_ranks(imported)
    assert sys.modules.pop("imported_while_stopped")


def test_a_stop_that_is_handled_is_not_raised_again() -> None:
    """The agent takes its time to end the ranks well."""
    handled = []

    def handle() -> None:
        try:
            asked()
        except Stop:
            time.sleep(1.5)
            handled.append(True)
            raise

    with pytest.raises(Stop):
        wait_for_ranks(handle)
    assert handled


def test_an_alarm_at_the_end_of_a_stop_arms_no_other_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its handler is gone by then: the alarm ended the process half a second later."""
    disarm = signal.setitimer

    def late(which: int, seconds: float) -> tuple[float, float]:
        found = disarm(which, seconds)
        if not seconds:
            signal.raise_signal(signal.SIGALRM)
        return found

    monkeypatch.setattr(signal, "setitimer", late)
    with pytest.raises(Stop):
        wait_for_ranks(asked)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
