"""Python's search for cycles of references, put off while objects are made by the million."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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
