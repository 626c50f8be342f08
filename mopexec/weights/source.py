"""What parameters are filled from: drawn from a seed, or read from files."""

import time
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from mopexec.model.initialize import initial_value
from mopsim.common.units import format_bytes

TELL_EVERY = 10.0
"""Seconds between two lines of `ToldSource`."""


class Source(Protocol):
    """Parts of parameters by name, in the single-device model's shapes."""

    def read(
        self, name: str, shape: tuple[int, ...], index: int | None, dim: int, start: int, stop: int
    ) -> Tensor:
        """Part [start, stop) along `dim` of a parameter (of slice `index` of its first dimension, whose shape
        is `shape`), on the CPU.
        """

    def buffer(self, name: str) -> Tensor | None:
        """A buffer; None: it starts at zero."""


class Seeded:
    """The weights that every sharding of this seed starts from."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def read(
        self, name: str, shape: tuple[int, ...], index: int | None, dim: int, start: int, stop: int
    ) -> Tensor:
        return initial_value(name, shape, self._seed, index).narrow(dim, start, stop - start)

    def buffer(self, name: str) -> Tensor | None:
        return None


class ToldSource:
    """Another source, which tells every TELL_EVERY seconds how much of it was read."""

    def __init__(self, source: Source, say: Callable[[str], None]) -> None:
        self._source, self._say = source, say
        self._read, self._last = 0, time.monotonic()

    def read(
        self, name: str, shape: tuple[int, ...], index: int | None, dim: int, start: int, stop: int
    ) -> Tensor:
        values = self._source.read(name, shape, index, dim, start, stop)
        self._read += values.nbytes
        if time.monotonic() - self._last >= TELL_EVERY:
            self._last = time.monotonic()
            self._say(f"reading weights: {format_bytes(self._read)} by rank 0, now {name}")
        return values

    def buffer(self, name: str) -> Tensor | None:
        return self._source.buffer(name)
