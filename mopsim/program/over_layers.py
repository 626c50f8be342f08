"""Rows of routed experts that layers keep for their backward, where each layer has a busiest rank of its own.

A step waits for the busiest rank of each layer; memory is of one rank over its layers. Routers of different
layers know nothing of each other's order of experts, so what a rank keeps comes near to the mean.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from msgspec.structs import replace

from mopsim.graph.liveness import Recomputation
from mopsim.graph.tape import Tape

DRAWS = 100
"""Networks over which the fullest rank's rows are averaged: its mean is then known within a per cent."""


@lru_cache(maxsize=256)
def fullest(shares: tuple[float, ...], degree: int, layers: int) -> float:
    """Rows of the rank that gets most of them over `layers` layers, over those of the busiest rank of one:
    shares are the experts' of all routes, on `degree` ranks in an order that each layer has of its own."""
    loads = np.array(shares).reshape(degree, -1).sum(axis=1)
    drawn = np.random.default_rng(0).permuted(np.tile(shares, (DRAWS * layers, 1)), axis=1)
    over = drawn.reshape(DRAWS, layers, degree, -1).sum(axis=3).mean(axis=1).max(axis=1)
    return min(1.0, float(over.mean() / loads.max()))


def held(tape: Tape, usual: Tape, chosen: Recomputation) -> Tape:
    """The tape of a layer's busiest rank, whose values that are kept for the backward are as large as those
    of `usual`, the same layer with fewer rows."""
    sizes = {name: value.bytes for name, value in usual.values.items()}
    kept = tape.kept - chosen.dropped
    kernels = (
        one.sized(lambda value: sizes[value.name] if value.name in kept else value.bytes)
        for one in tape.kernels
    )
    return replace(tape, kernels=tuple(kernels))


def fewer(routes: Sequence[int], share: float) -> tuple[int, ...]:
    """A part of each expert's rows; one that has any has one at least."""
    return tuple(max(min(1, rows), round(rows * share)) for rows in routes)
