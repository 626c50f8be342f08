"""How decoder layers are laid over the parts of a pipeline: as even as can be, or as in published recipes."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from mopsim.spec.layout import ceil_div, stage_layers
from mopsim.spec.model import ModelSpec

EVEN, ENDS, FRONT, IDEAL = 0, 1, 2, 3
"""Codes of the `layout` column. EVEN: as even as can be. ENDS: as full as each other, where embedding, MTP
layers and loss count as a layer each. FRONT: as full as each other but the last, which has what is left.
IDEAL: no layout; every stage has the mean and none waits: of what bounds all layouts from below."""
RULES = (EVEN, ENDS, FRONT)
LAYOUTS = ("even", "ends", "front")
"""Their names in recipes.yaml."""


def layers_of(model: ModelSpec, stages: int, virtual: int, layout: int) -> tuple[int, ...] | None:
    """Decoder layers of each part; empty: as even as can be. None where the layout is none of its own.

    ENDS and FRONT are those of Megatron-Bridge: 61 layers with MTP are 1, 2 (30 times), 0 on 32 parts and 4
    (15 times), 1 on 16 (pipeline_model_parallel_layout of perf_recipes/deepseek).
    """
    layers, parts = model.num_hidden_layers, stages * virtual
    if layout in (EVEN, IDEAL):
        return () if parts <= layers else None
    first = int(layout == ENDS)
    last = first * (1 + model.num_nextn_predict_layers)
    full = ceil_div(layers + first + last, parts)
    found, left = [], layers
    for part in range(parts):
        found.append(min(left, full - first if part == 0 else full))
        left -= found[-1]
    if stages == 1 or left or (parts > 2 and found[-2] < full):
        return None
    return None if tuple(found) == tuple(_even(layers, parts)) else tuple(found)


def _even(layers: int, parts: int) -> list[int]:
    return [len(stage_layers(layers, parts, 1, part)[0]) for part in range(parts)]


@dataclass(frozen=True)
class Load:
    """Of each stage: layers; layers that a microbatch passes before its first part."""

    layers: NDArray[np.float64]
    before: NDArray[np.float64]


@cache
def load(model: ModelSpec, stages: int, virtual: int, layout: int) -> Load:
    """What each stage of a pipeline has to do."""
    given = layers_of(model, stages, virtual, layout) or _even(model.num_hidden_layers, stages * virtual)
    parts = np.array(given, dtype=np.float64).reshape(virtual, stages)
    return Load(parts.sum(axis=0), np.concatenate([[0.0], np.cumsum(parts[0])[:-1]]))
