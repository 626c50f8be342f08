"""Layouts that a practitioner tries first: every search simulates them, so that it is never worse."""

import numpy as np

from mopsim.search.problem import Column
from mopsim.search.space import Space
from mopsim.search.wires import Reals

PIPELINES = (1, 2, 4, 8, 16)


def textbook(space: Space, likely: Reals) -> list[int]:
    """Rows of a space, the one of the best guess of each of these, fewest stages first:

    - experts spread over as many ranks of a node as divide them, one sequence a microbatch, neither tensor
      nor sequence split where that is legal, for 1, 2, 4, 8 and 16 stages, with and without recomputation;
    - the same with any split, and with more sequences a microbatch;
    - the same with all state on the device, and the layer inputs there or on the host.
    """
    c = space.columns
    node = space.problem.hardware.devices_per_node
    inside = (c["experts"] <= node) & (c["expert_tensor"] == 1)
    unsplit = (c["sequence"] == 1) & (c["tensor"] == 1)
    single, stay = c["micro_batch"] == 1, (c["state"] == 0) & (c["offload"] == 0)
    masks = []
    for stages in PIPELINES:
        for again in (1, 0):
            alike = inside & (c["pipeline"] == stages) & (c["recompute"] == again)
            near = alike & (c["experts"] == np.where(alike, c["experts"], 0).max(initial=0))
            masks += [near & unsplit & single, near & single, near & unsplit & ~single]
            masks += [near & stay & (c["boundary_host"] == away) for away in (0, 1)]
    found = [first for mask in masks if (first := _first(mask, likely)) is not None]
    return list(dict.fromkeys(found))


def _first(mask: Column, likely: Reals) -> int | None:
    return int(np.argmin(np.where(mask, likely, np.inf))) if mask.any() else None
