"""How decoder layers are laid over the parts of a pipeline: as even as can be, or as in published recipes."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from mopsim.spec.layout import ceil_div, full_parts
from mopsim.spec.model import LayerKind, ModelSpec
from mopsim.spec.pipeline_order import warm_up
from mopsim.spec.strategy import even_parts

EVEN, ENDS, FRONT, IDEAL, BALANCED = 0, 1, 2, 3, 4
"""Codes of the `layout` column. EVEN: as even as can be. ENDS: as full as each other, where embedding, MTP
layers and loss count as a layer each. FRONT: as full as each other but the last, which has what is left.
IDEAL: no layout; every stage has the mean and none waits, and holds the least of any layout: of what bounds
all from below. BALANCED + n: the last stage, which has the loss, has n layers fewer than an even share, the
others as many as each other. WEIGHTED + n: parts of the same weight, where layers without experts or with a
window count as WEIGHTS[n] of others, and the loss as one of these. BALANCED: the best of the last two, before
it is chosen (`mopsim.search.balance`)."""
RULES = (EVEN, ENDS, FRONT, BALANCED)
"""Those that an axis has."""
LIGHTEST = 12
"""Layers that the last stage has fewer than an even share, at most."""
WEIGHTED, WEIGHTS = BALANCED + LIGHTEST + 1, (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
VIRTUAL = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24)
"""Virtual stages of a pipeline rank: those of published recipes, and what lies between."""
LAYOUTS = ("even", "ends", "front")
"""Their names in recipes.yaml."""


@cache
def layers_of(model: ModelSpec, stages: int, virtual: int, layout: int) -> tuple[int, ...] | None:
    """As `_layers_of`, of whole groups of layers that attend to the same keys. None where a part before the
    last would have none."""
    found = _layers_of(model, stages, virtual, layout)
    if model.sparse_attention.index_topk_freq == 1 or found is None or stages == 1 or layout == IDEAL:
        return found
    whole = model.whole_groups(found or even_parts(model.num_hidden_layers, stages * virtual))
    return whole if all(whole[:-1]) else None


def _layers_of(model: ModelSpec, stages: int, virtual: int, layout: int) -> tuple[int, ...] | None:
    """Decoder layers of each part; empty: as even as can be. None where the layout is none of its own.

    ENDS and FRONT are those of published recipes (recipes.yaml): 61 layers with MTP are 1, 2 (30 times), 0 on
    32 parts and 4 (15 times), 1 on 16.
    """
    layers, parts = model.num_hidden_layers, stages * virtual
    if layout in (EVEN, IDEAL, BALANCED):
        return () if parts <= layers else None
    if layout >= WEIGHTED:
        return _weighted(model, parts, WEIGHTS[layout - WEIGHTED])
    if layout > BALANCED:
        return _lighter(layers, stages, virtual, layout - BALANCED)
    first = int(layout == ENDS)
    last = first * (1 + model.num_nextn_predict_layers)
    found = full_parts(layers, parts, first, last)
    ragged = parts > 2 and found[-2] < ceil_div(layers + first + last, parts)
    if stages == 1 or sum(found) < layers or ragged:
        return None
    return None if found == even_parts(layers, parts) else found


def _lighter(layers: int, stages: int, virtual: int, fewer: int) -> tuple[int, ...] | None:
    """`fewer` layers less than an even share on the last stage: in its last part, and where that has none
    left in its others. None where a part would have none that has neither embedding nor loss."""
    mine = layers // stages - fewer
    if stages == 1 or mine < 0:
        return None
    last = max(0, mine - (virtual - 1) * ceil_div(layers, stages * virtual))
    ends = [*_spread(mine - last, virtual - 1), last]
    others = _spread(layers - mine, virtual * (stages - 1))
    rows = [others[at * (stages - 1) : (at + 1) * (stages - 1)] + ends[at : at + 1] for at in range(virtual)]
    found = tuple(count for row in rows for count in row)
    return found if all(found[:-1]) else None


def _weighted(model: ModelSpec, parts: int, light: float) -> tuple[int, ...] | None:
    """Layers by the part in which the middle of their weight lies, the loss as one more. None where a part
    before it would have none, or fewer than a quarter of the layers weigh less: a few leading dense ones
    change no stage by much."""
    kinds = [model.layer_kind(layer) for layer in range(model.num_hidden_layers)]
    routed, full = (any(kind.routed for kind in kinds), any(not kind.window for kind in kinds))
    lighter = [(routed and not kind.routed) + (full and kind.window > 0) for kind in kinds]
    weights = light ** np.array(lighter, dtype=np.float64)
    middle = np.cumsum(weights) - weights / 2
    found = np.bincount((middle * parts / (weights.sum() + 1)).astype(np.int64), minlength=parts)
    many = 4 * np.count_nonzero(lighter) >= len(lighter)
    return tuple(found.tolist()) if parts > 1 and many and found[:-1].all() else None


def _spread(layers: int, parts: int) -> list[int]:
    """As even as can be, the fuller parts last: the first stage has the embedding, and most microbatches."""
    return [*even_parts(layers, parts)][::-1] if parts else []


@cache
def plain(model: ModelSpec, stages: int, virtual: int) -> tuple[int, ...]:
    """The layouts that a pipeline may have whatever its stages take. Of virtual stages of which some have
    more layers than others, not EVEN: ENDS and FRONT are those of recipes."""
    uneven = virtual > 1 and model.num_hidden_layers % (stages * virtual)
    rules = (ENDS, FRONT) if uneven else (EVEN, ENDS, FRONT)
    found = [rule for rule in rules if layers_of(model, stages, virtual, rule) is not None]
    return tuple(found) if stages > 1 or virtual == 1 else ()


def can_lay(model: ModelSpec, stages: int) -> bool:
    """Whether the layers can be laid over so many stages."""
    return stages <= model.num_hidden_layers and any(plain(model, stages, virtual) for virtual in VIRTUAL)


@cache
def lighter(model: ModelSpec, stages: int, virtual: int) -> tuple[int, ...]:
    """Codes of what BALANCED may become, the most even first; none where a pipeline has no plain layout."""
    codes = range(BALANCED + 1, WEIGHTED + len(WEIGHTS)) if plain(model, stages, virtual) else ()
    return tuple(code for code in codes if layers_of(model, stages, virtual, code) is not None)


def laid(columns: Mapping[str, NDArray[np.int64]]) -> NDArray[np.int64]:
    """A code of the pipeline, virtual stages and layout of each row."""
    return np.asarray((columns["pipeline"] * 1000 + columns["virtual_stages"]) * 100 + columns["layout"])


def parts_of(code: int) -> tuple[int, int, int]:
    """(Stages, virtual stages, layout) of a code."""
    return code // 100_000, code // 100 % 1000, code % 100


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


def largest_chunks(model: ModelSpec, columns: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float64]:
    """Layers of the largest model chunk of each row."""
    codes, which = np.unique(laid(columns), return_inverse=True)
    most = [load(model, *parts_of(code)).parts.sum(axis=2).max() for code in codes.tolist()]
    return np.array(most)[which]


@cache
def parts_by_turn(
    model: ModelSpec, stages: int, virtual: int, layout: int
) -> tuple[tuple[int, NDArray[np.float64]], ...]:
    """(Virtual stages, different parts that stages have in each of them): the ranks of a pipeline go through
    their parts in step."""
    rows = load(model, stages, virtual, layout).parts.transpose(1, 0, 2).tolist()
    found = Counter(frozenset(map(tuple, row)) for row in rows)
    return tuple((times, np.array(sorted(parts))) for parts, times in found.items())


@cache
def of_stage(model: ModelSpec, stages: int, virtual: int, layout: int, stage: int) -> NDArray[np.float64]:
    """Layers of each kind of a stage, at least."""
    if layout == IDEAL:
        every = [parts[:, stage].sum(axis=1).min(axis=0) for _, parts in _layouts(model, stages)]
        return np.asarray(np.minimum.reduce(every))
    return np.asarray(load(model, stages, virtual, layout).layers[stage])


@cache
def under_way(
    model: ModelSpec, stages: int, virtual: int, layout: int, microbatches: int, stage: int, ahead: int
) -> NDArray[np.float64]:
    """Forwards through layers of each kind that a stage has behind it when its first backward begins, the
    last of several its first loss, at least; ahead: see `mopsim.spec.pipeline_order`."""
    every = (
        _layouts(model, stages) if layout == IDEAL else [(virtual, _parts(model, stages, virtual, layout))]
    )
    last = stage == stages - 1 and stages > 1
    found = []
    for virtual, parts in every:
        # woven with a backward, the forward beside it is not over when that begins
        count = (virtual - 1) * stages + 1 if last else warm_up(stages, virtual, stage, ahead) + 1 - ahead
        chunks = np.arange(min(count, microbatches * virtual)) % (stages * virtual) // stages
        many = np.bincount(chunks, minlength=virtual)
        found.append((many @ parts[:, stage]).min(axis=0))
    return np.asarray(np.minimum.reduce(found))


def _parts(model: ModelSpec, stages: int, virtual: int, *layouts: int) -> NDArray[np.float64]:
    """Layers of each kind, by layout, stage and virtual stage."""
    return np.stack([load(model, stages, virtual, layout).parts for layout in layouts])


@cache
def _layouts(model: ModelSpec, stages: int) -> tuple[tuple[int, NDArray[np.float64]], ...]:
    """(Virtual stages, their parts in every layout) of all that a pipeline may have."""
    found = []
    for virtual in VIRTUAL:
        if every := plain(model, stages, virtual) + lighter(model, stages, virtual):
            found.append((virtual, _parts(model, stages, virtual, *every)))
    return tuple(found)
