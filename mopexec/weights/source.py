"""What parameters are filled from: drawn from a seed, or read from files."""

from typing import Protocol

from torch import Tensor

from mopexec.model.initialize import initial_value


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
