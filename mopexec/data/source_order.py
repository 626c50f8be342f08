"""Which source of a mixture each sequence is of: every source at even distances, by its share."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

ORDER = "even distances"
"""The name of this order in digests of mixtures: another order takes another name."""
_TURN = 1024
"""Sequences that are ordered at once, about."""

Ints = npt.NDArray[np.int64]


class SourceOrder:
    """The j-th sequence (from 0) of a source with share s would stand at (j + 1/2) / s; all sequences are
    ordered by that, those of the first source first where two want one place. So a share of any size is kept
    over the run, and each sequence is known from its index alone.
    """

    def __init__(self, weights: list[float]) -> None:
        self._share = np.array(weights) / sum(weights)
        self._turn = lru_cache(maxsize=4)(self._ordered)

    def place(self, index: int) -> tuple[int, int]:
        """(source, sequences of it before this one) of sequence `index`."""
        turn = index // _TURN  # rounding moves a turn's begin by at most one sequence a source
        while index < self._before(turn).sum():
            turn -= 1
        while index >= self._before(turn + 1).sum():
            turn += 1
        source, earlier = self._turn(turn)
        at = index - int(self._before(turn).sum())
        return int(source[at]), int(earlier[at])

    def once(self, sizes: list[int], most: int) -> list[tuple[int, int]]:
        """(source, which of its sequences) of the first `most`, where a source of n sequences ends with its
        n-th.
        """
        ends = np.minimum(np.array(sizes, dtype=np.int64), most)
        source, earlier = self._merged(np.zeros_like(ends), ends)
        return list(zip(source[:most].tolist(), earlier[:most].tolist(), strict=True))

    def _before(self, turn: int) -> Ints:
        """Sequences of each source before a turn."""
        wanted = np.ceil(turn * _TURN * self._share - 0.5)
        return np.maximum(wanted, 0).astype(np.int64)

    def _ordered(self, turn: int) -> tuple[Ints, Ints]:
        return self._merged(self._before(turn), self._before(turn + 1))

    def _merged(self, begins: Ints, ends: Ints) -> tuple[Ints, Ints]:
        """Source and number of the sequences [begin, end) of every source, in order."""
        counts = ends - begins
        source = np.repeat(np.arange(len(counts)), counts)
        earlier = np.arange(len(source)) + np.repeat(begins - (np.cumsum(counts) - counts), counts)
        order = np.argsort((earlier + 0.5) / self._share[source], kind="stable")
        return source[order], earlier[order]
