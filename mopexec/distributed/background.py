"""Work beside the step, in order: on CUDA on a stream of its own, issued at once; on a CPU by one thread.

Where every op is watched (a dry run, a memory tracker, a timer) it runs at once, on the caller's thread.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from mopexec.distributed.tiers import Platform

PATIENCE = 0.5  # seconds between two looks at whether the thread has failed


class Background:
    """threaded: whether a thread of its own does the latest work, for which the host itself waits."""

    def __init__(self, platform: Platform, stream: str) -> None:
        self.platform, self.stream, self.threaded = platform, stream, False
        self._pool: ThreadPoolExecutor | None = None
        self._given: deque[Future[None]] = deque()

    def run(self, work: Callable[[], None]) -> None:
        """Do `work` after what the current stream has been given so far, and after earlier work."""
        before = self.platform.record()

        def ordered() -> None:
            with torch.no_grad(), self.platform.stream(self.stream):
                self.platform.wait(before)
                work()

        watched = _get_current_dispatch_mode() is not None
        self.threaded = not (self.platform.is_cuda or self.platform.fake or watched)
        if not self.threaded:
            self.finish()
            ordered()
            return
        self.check()
        self._pool = self._pool or ThreadPoolExecutor(1, self.stream)
        self._given.append(self._pool.submit(ordered))

    def check(self) -> None:
        """Raise what work that is over has raised."""
        while self._given and self._given[0].done():
            self._given.popleft().result()

    def finish(self) -> None:
        """Wait until the host has no more to do; raises what the work has raised."""
        while self._given:
            self._given.popleft().result()


class Signal:
    """A point that work in the background reaches, for those who need what it makes. Reached at first."""

    def __init__(self, background: Background) -> None:
        self._background, self._platform = background, background.platform
        self._reached = threading.Event()
        self._reached.set()
        self._event: object = None

    @property
    def pending(self) -> bool:
        """Whether the current stream still has to wait."""
        return not self._reached.is_set() or self._event is not None

    def clear(self) -> None:
        """The point is ahead again."""
        self._reached.clear()
        self._event = None

    def set(self) -> None:
        """The current stream has reached the point."""
        self._event = self._platform.record()
        self._reached.set()

    def wait(self) -> None:
        """What the current stream is given from now on comes after the point."""
        self._wait_host()
        self._platform.wait(self._event)
        self._event = None

    @contextmanager
    def beside(self, stream: str) -> Iterator[None]:
        """What is issued inside comes after the point and after all so far; the current stream goes on."""
        self._wait_host()
        if self._event is None:
            yield
            return
        so_far = self._platform.record()
        with self._platform.stream(stream):
            self._platform.wait(so_far)
            self._platform.wait(self._event)
            yield

    def _wait_host(self) -> None:
        while not self._reached.wait(PATIENCE):
            self._background.check()
