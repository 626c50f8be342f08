"""Python's search for cycles of references, put off while objects are made by the million."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

USUAL = gc.get_threshold()


@contextmanager
def collected_later() -> Iterator[None]:
    """No search for cycles in the body (or the function that this decorates). What a simulation or a search
    makes has hardly any, and looking through it takes a tenth of their time (tests/bench/size.py)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def collected_seldom() -> Iterator[None]:
    """Fewer searches for cycles in the body: a command that begins. What is imported stays, and looking
    through it while more is was 0.5 of the 2.1 CPU seconds that a rank of a training took to import torch."""
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 20)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def all_stays() -> None:
    """What there is now stays, what comes is collected as usual: a search through a rank's modules took 0.2 s
    in the middle of a step."""
    gc.freeze()
    gc.set_threshold(*USUAL)
