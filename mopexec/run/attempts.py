"""What one attempt of a launch leaves for the next, in the store of the agent that starts the ranks again."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from mopexec.run.environment import place
from mopsim.common.errors import MopError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

Note = Literal["begun", "mistake"]
"""The ranks had met, so that the run's directory is this launch's; one of them met a user's mistake."""

_ANSWER = timedelta(minutes=1)


def leave(note: Note) -> None:
    """For later attempts; nothing where no agent would make one."""
    if (store := _store()) is not None:
        store.set(f"mopexec/{note}", "1")


def left(note: Note) -> bool:
    """Whether an earlier attempt of this launch left it."""
    store = _store()
    return store is not None and store.check([f"mopexec/{note}"])


@contextmanager
def no_mistake_again() -> Iterator[None]:
    """A user's mistake in this block is one in every attempt: the next one knows."""
    try:
        yield
    except MopError:
        leave("mistake")
        raise


def _store() -> "TCPStore | None":
    """The agent's, which outlives its ranks."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch._C._distributed_c10d import TCPStore

    own = place()
    address = os.environ["MASTER_ADDR"]
    return TCPStore(address, own.port, own.world_size, False, _ANSWER, wait_for_workers=False)
