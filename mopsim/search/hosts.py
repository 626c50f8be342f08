"""Bytes of the host with which a candidate fits as good as surely, at least."""

import numpy as np

from mopsim.engine.upper import PROCESS
from mopsim.intervals.memory import on_top
from mopsim.intervals.spread import SURE
from mopsim.search.facts import SpaceFacts
from mopsim.search.footprint import Footprint
from mopsim.search.learn import codes
from mopsim.search.pieces import BLOCKS, Pieces
from mopsim.search.problem import Column
from mopsim.search.wires import Reals


def surely_on_host(pieces: Pieces, given: SpaceFacts, rows: Column) -> Reals:
    """Of some rows: what is there, at least, and of what comes on top (`mopsim.engine.upper.host`) the share
    that is enough as surely as is asked of a plan."""
    if not len(rows):
        return np.zeros(0)
    space = pieces.space.take(rows)
    footprint, stack = Footprint(space, given), space.stack
    least = footprint.host_memory()
    if given.hardware.device_kind == "cpu" or stack.pool:
        return least
    alike = codes([*(space.columns[name] for name in BLOCKS), *space.within()], len(rows))
    _, first, place = np.unique(alike, return_index=True, return_inverse=True)
    made = [pieces.pinned(int(row)) for row in rows[first]]
    inputs = "boundaries" if footprint.flat else "activations"
    top = np.full(len(rows), float(PROCESS))
    for name, size in zip(("optimizer", "params", inputs), footprint.on_host(), strict=True):
        times = np.array([one.get(name, one.get("other", 1.0)) for one in made])[place.reshape(-1)]
        top += size * (times - 1.0)
    return np.where(least > 0, least + on_top(SURE) * top, 0.0)
