"""What the recomputation of a checkpoint takes from its forward, so that the host does not ask the device
again: the counts of its routes.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from mopexec.measure.scope import phase

T = TypeVar("T")


class _Again:
    """The forward of a checkpoint (replays: its recomputation) while entered."""

    now: "_Again | None" = None

    def __init__(self, found: list[Any], *, replays: bool) -> None:
        self.found, self.replays = found, replays
        self._phase = phase("recompute") if replays else nullcontext()
        self.left: Iterator[Any] = iter(())
        self._outer: list[_Again | None] = []

    def __enter__(self) -> None:
        self._outer.append(_Again.now)
        _Again.now, self.left = self, iter(self.found)
        self._phase.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._phase.__exit__(*error)
        _Again.now = self._outer.pop()


def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """`context_fn` of torch's checkpoint: of its forward, and of its recomputation."""
    found: list[Any] = []
    return _Again(found, replays=False), _Again(found, replays=True)


def once(make: Callable[[], T]) -> T:
    """What `make` gives; in a recomputation, what it gave in the forward."""
    run = _Again.now
    if run is None:
        return make()
    if run.replays:
        found: T = next(run.left)
        return found
    found = make()
    run.found.append(found)
    return found
