"""Layouts that a practitioner tries first: every search simulates them, so that it is never worse."""

import math
from collections.abc import Collection, Iterator
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mopsim.common.io import Spec, convert
from mopsim.common.shipped import shipped
from mopsim.search.problem import DEVICE, FULL, RECOMPUTED
from mopsim.search.space import Space
from mopsim.search.stages import LAYOUTS
from mopsim.search.wires import Reals

PIPELINES = (1, 2, 4, 8, 16)
ALIKE = 2.0
"""A recipe is tried for networks of up to so many times its parameters, or so many times fewer."""

DEGREES = ("micro_batch", "tensor", "pipeline", "virtual_stages", "sequence", "experts", "expert_tensor")

Mask = NDArray[np.bool_]


class Recipe(Spec, frozen=True, kw_only=True):
    """A published layout: see recipes.yaml. hardware, devices, seq_len, global_batch: of the run. The others
    are columns of a space, of which DEGREES say what they are themselves."""

    family: str = "megatron"
    model: str
    parameters: float
    hardware: str
    devices: int
    seq_len: int
    global_batch: int
    source: str
    micro_batch: int = 1
    tensor: int = 1
    pipeline: int = 1
    virtual_stages: int = 1
    layout: Literal["even", "ends", "front"] = "even"
    sequence: int = 1
    experts: int = 1
    expert_tensor: int = 1
    dispatcher: Literal["alltoall", "once"] = "alltoall"
    overlap: bool = False
    recompute: bool = False
    reshard: bool = False
    modules: tuple[str, ...] = ()

    def masks(self, space: Space) -> Iterator[tuple[str, Mask]]:
        """(Column, whether each row has what the recipe says of it)."""
        wanted = {name: getattr(self, name) for name in DEGREES} | {
            "layout": LAYOUTS.index(self.layout), "overlap": int(self.overlap),
            "modules": RECOMPUTED.index(self.modules), "recompute": int(self.recompute), "saved": 0,
            "boundary_host": 0, "state": DEVICE, "reshard": int(self.reshard), "loss": FULL, "in_node": 0,
        }  # fmt: skip
        for name, value in wanted.items():
            yield name, space.columns[name] == value
        yield "dispatcher", (space.columns["dispatcher"] > 0) == (self.dispatcher == "once")


@cache
def recipes() -> tuple[Recipe, ...]:
    """Those of recipes.yaml, in its order."""
    listed = shipped("mopsim.search", "recipes.yaml")
    return tuple(convert(one, Recipe, f"recipes.yaml, {place}") for place, one in enumerate(listed))


def textbook(space: Space, likely: Reals, free: Collection[str] = ()) -> list[int]:
    """Rows to try first, by their place: published recipes of networks of this size, then textbook layouts by
    their guessed time. free: columns that are not chosen yet."""
    plain = sorted(_plain(space, likely), key=lambda place: float(likely[place]))
    return list(dict.fromkeys([*published(space, likely, free), *plain]))


def published(space: Space, likely: Reals, free: Collection[str] = ()) -> list[int]:
    """The best guess of the rows that agree with each recipe, those for this network first, then those for
    networks of its size."""
    found, model = [], space.problem.model.name

    def apart(recipe: Recipe) -> float:
        return abs(math.log(space.problem.total_params / (recipe.parameters * 1e9)))

    alike = [one for one in recipes() if one.family == space.family and apart(one) <= math.log(ALIKE)]
    for recipe in sorted(alike, key=lambda one: (one.model != model, apart(one))):
        masks = [mask for name, mask in recipe.masks(space) if name not in free]
        first = _first(np.logical_and.reduce(masks), likely)
        if first is not None:
            found.append(first)
    return found


def _plain(space: Space, likely: Reals) -> list[int]:
    """Of each of these the row of the best guess, fewest stages first:

    - experts spread over as many ranks of a node as divide them, one sequence a microbatch, neither tensor
      nor sequence split where that is legal, for 1, 2, 4, 8 and 16 stages, with and without recomputation;
    - in one stage, the same with all state on the device, and the layer inputs there or on the host.
    """
    c = space.columns
    node = space.problem.hardware.devices_per_node
    inside = (c["experts"] <= node) & (c["expert_tensor"] == 1)
    unsplit = (c["sequence"] == 1) & (c["tensor"] == 1)
    single, stay = c["micro_batch"] == 1, (c["state"] == 0) & (c["offload"] == 0)
    found: list[int | None] = []
    for stages in PIPELINES:
        for again in (1, 0):
            alike = inside & (c["pipeline"] == stages) & (c["recompute"] == again)
            near = alike & (c["experts"] == np.where(alike, c["experts"], 0).max(initial=0))
            plain = _first(near & unsplit & single, likely)
            found.append(_first(near & single, likely) if plain is None else plain)
            if stages == 1:
                found += [_first(near & stay & (c["boundary_host"] == away), likely) for away in (0, 1)]
    return list(dict.fromkeys(place for place in found if place is not None))


def _first(mask: Mask, likely: Reals) -> int | None:
    return int(np.argmin(np.where(mask, likely, np.inf))) if mask.any() else None
