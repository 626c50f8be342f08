"""How decoder layers are laid over the parts of a pipeline: as even as can be, or as in published recipes."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from mopsim.spec.layout import ceil_div, even_parts, full_parts
from mopsim.spec.model import LayerKind, ModelSpec
from mopsim.spec.pipeline_order import warm_up

EVEN, ENDS, FRONT, IDEAL = 0, 1, 2, 3
"""Codes of the `layout` column. EVEN: as even as can be. ENDS: as full as each other, where embedding, MTP
layers and loss count as a layer each. FRONT: as full as each other but the last, which has what is left.
IDEAL: no layout; every stage has the mean and none waits, and holds the least of any layout: of what bounds
all from below."""
RULES = (EVEN, ENDS, FRONT)
VIRTUAL = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24)
"""Virtual stages of a pipeline rank: those of published recipes, and what lies between."""
LAYOUTS = ("even", "ends", "front")
"""Their names in recipes.yaml."""


@cache
def layers_of(model: ModelSpec, stages: int, virtual: int, layout: int) -> tuple[int, ...] | None:
    """Decoder layers of each part; empty: as even as can be. None where the layout is none of its own.

    ENDS and FRONT are those of published recipes (recipes.yaml): 61 layers with MTP are 1, 2 (30 times), 0 on
    32 parts and 4 (15 times), 1 on 16.
    """
    layers, parts = model.num_hidden_layers, stages * virtual
    if layout in (EVEN, IDEAL):
        return () if parts <= layers else None
    first = int(layout == ENDS)
    last = first * (1 + model.num_nextn_predict_layers)
    found = full_parts(layers, parts, first, last)
    ragged = parts > 2 and found[-2] < ceil_div(layers + first + last, parts)
    if stages == 1 or sum(found) < layers or ragged:
        return None
    return None if found == even_parts(layers, parts) else found


@cache
def kinds(model: ModelSpec) -> dict[LayerKind, int]:
    """Layers of each kind, in the order of their first one."""
    return {kind: len(layers) for kind, layers in model.layer_kinds().items()}


@dataclass(frozen=True)
class Load:
    """Rows are stages, columns kinds of layers. layers: that it has; before: that a microbatch passes before
    its first part. parts: layers of each virtual stage of each stage."""

    layers: NDArray[np.float64]
    before: NDArray[np.float64]
    parts: NDArray[np.float64]


@cache
def load(model: ModelSpec, stages: int, virtual: int, layout: int) -> Load:
    """What each stage of a pipeline has to do."""
    given = layers_of(model, stages, virtual, layout) or even_parts(model.num_hidden_layers, stages * virtual)
    order = list(kinds(model))
    each = np.array([[model.layer_kind(layer) == kind for kind in order] for layer in range(sum(given))])
    ends = np.cumsum(given)
    parts = np.array([each[end - count : end].sum(axis=0) for end, count in zip(ends, given, strict=True)])
    parts = parts.reshape(virtual, stages, len(order))
    before = np.cumsum(parts[0], axis=0) - parts[0]
    return Load(parts.sum(axis=0), before, parts.transpose(1, 0, 2))


@cache
def of_stage(model: ModelSpec, stages: int, virtual: int, layout: int, stage: int) -> NDArray[np.float64]:
    """Layers of each kind of a stage, at least."""
    if layout == IDEAL:
        every = [of_stage(model, stages, *one, stage) for one in _layouts(model, stages)]
        return np.asarray(np.minimum.reduce(every))
    return np.asarray(load(model, stages, virtual, layout).layers[stage])


@cache
def under_way(
    model: ModelSpec, stages: int, virtual: int, layout: int, microbatches: int, stage: int, ahead: int
) -> NDArray[np.float64]:
    """Forwards through layers of each kind that a stage has behind it when its first backward begins, the
    last of several its first loss, at least; ahead: see `mopsim.spec.pipeline_order`."""
    if layout == IDEAL:
        every = [
            under_way(model, stages, *one, microbatches, stage, ahead) for one in _layouts(model, stages)
        ]
        return np.asarray(np.minimum.reduce(every))
    last = stage == stages - 1 and stages > 1
    # woven with a backward, the forward beside it is not over when that begins
    count = (virtual - 1) * stages + 1 if last else warm_up(stages, virtual, stage, ahead) + 1 - ahead
    chunks = np.arange(min(count, microbatches * virtual)) % (stages * virtual) // stages
    many = np.bincount(chunks, minlength=virtual)
    return np.asarray(many @ load(model, stages, virtual, layout).parts[stage])


@cache
def _layouts(model: ModelSpec, stages: int) -> tuple[tuple[int, int], ...]:
    """(virtual stages, layout) of all that a pipeline may have."""
    return tuple(
        (virtual, layout)
        for virtual in (VIRTUAL if stages > 1 else VIRTUAL[:1])
        for layout in RULES
        if layers_of(model, stages, virtual, layout) is not None
    )
