"""What the recomputation of a checkpoint takes from its forward instead of making it again: the counts of
routes, so that the host does not ask the device again, and what kernels made whose outputs a strategy keeps
(activations.save_ops).
"""

from collections import deque
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from torch import Tensor

from mopexec.measure.scope import phase

T = TypeVar("T")


class _Again:
    """The forward of a checkpoint (replays: its recomputation) while entered. What was found is let go as it
    is taken, the rest once the recomputation ends.
    """

    now: "_Again | None" = None

    def __init__(self, found: deque[Any], names: Collection[str], *, replays: bool) -> None:
        self.found, self.names, self.replays = found, frozenset(names), replays
        self._phase = phase("recompute") if replays else nullcontext()
        self._outer: list[_Again | None] = []

    def __enter__(self) -> None:
        self._outer.append(_Again.now)
        _Again.now = self
        self._phase.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._phase.__exit__(*error)
        _Again.now = self._outer.pop()
        if self.replays:
            self.found.clear()


def contexts(names: Collection[str] = ()) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """`context_fn` of torch's checkpoint: of its forward, and of its recomputation. names: of kernels that
    this does not run again."""
    found: deque[Any] = deque()
    return _Again(found, names, replays=False), _Again(found, names, replays=True)


def once(make: Callable[[], T]) -> T:
    """What `make` gives; in a recomputation, what it gave in the forward."""
    run = _Again.now
    if run is None:
        return make()
    if run.replays:
        taken: T = run.found.popleft()
        return taken
    found = make()
    run.found.append(_alias(found))
    return found


def keeps(*names: str) -> bool:
    """Whether a recomputation takes what the kernels of these names made in the forward."""
    return _Again.now is not None and _Again.now.names.issuperset(names)


def kept(make: Callable[[], T], *names: str) -> T:
    """`once` where what the kernels of these names make is kept. For forwards of autograd.Function, which
    save the same for their backward in a recomputation as in a forward."""
    return once(make) if keeps(*names) else make()


def _alias(found: Any) -> Any:
    """The same without what autograd will tie to its tensors."""
    if isinstance(found, Tensor):
        return found.detach()
    return tuple(map(_alias, found)) if type(found) is tuple else found
