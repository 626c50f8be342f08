"""Processes that a command starts: none outlives it, however it ends."""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path

from mopsim.common.errors import MopError

_PR_SET_PDEATHSIG = 1
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def end_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent ends, however that happens (Linux; nothing
    elsewhere). parent: its process, where it may have ended already; 0: whichever it is now.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = parent or os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended in between
        os._exit(1)


def kill_children() -> bool:
    """Kill every process that this one started; whether there was one (Linux; nothing elsewhere)."""
    found = False
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z":
                os.kill(int(path.parent.name), signal.SIGKILL)
                found = True
    return found


def end_children() -> None:
    """Kill them and wait until each has ended, but for those that the system holds for over 5 s."""
    end = time.monotonic() + 5
    while kill_children() and time.monotonic() < end:
        time.sleep(0.01)


def workers(jobs: int) -> int:
    """How many processes are meant: 0 is one for each core, at most 4."""
    return jobs or min(4, os.cpu_count() or 1)


@contextmanager
def pool(count: int) -> Iterator[ProcessPoolExecutor]:
    """`count` processes for the body; what ends it early (an error, Ctrl-C) ends them at once."""
    before = set(multiprocessing.active_children())
    with ProcessPoolExecutor(count, initializer=_begin, initargs=(os.getpid(),)) as executor:
        try:
            with _signals_held():  # until `_begin`, a process would answer them as its parent does
                for _ in range(count):
                    executor.submit(os.getpid)
            yield executor
        except BaseException as error:
            for process in set(multiprocessing.active_children()) - before:
                process.kill()
            executor.shutdown(cancel_futures=True)  # its thread ends now, not beside the interpreter
            if isinstance(error, BrokenProcessPool):
                why = "was ended by the system (out of memory on this machine?)"
                raise MopError(f"one of {count} worker processes {why}") from error
            raise


@contextmanager
def _signals_held() -> Iterator[None]:
    """Signals that end a command wait for the end of the body; processes begun in it begin with them held."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(parent: int) -> None:
    """The terminal's Ctrl-C and its end are the parent's to answer; its handlers are not for this process.
    parent: the command's process, which may have been killed before this one came here."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent(parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
