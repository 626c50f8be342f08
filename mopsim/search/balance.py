"""Which layout of the layers over a pipeline is balanced: the loss takes as long as some layers."""

import numpy as np

from mopsim.search.bound import BLOCK, Bounder
from mopsim.search.facts import SpaceFacts
from mopsim.search.problem import Column
from mopsim.search.space import Space, taken
from mopsim.search.stages import BALANCED, IDEAL, laid, lighter, load, parts_by_turn, parts_of, plain
from mopsim.search.wires import Reals
from mopsim.spec.model import ModelSpec

GAIN = 0.05
"""Part by which another layout takes longer, at least: more candidates that are hardly faster cost the search
more than they are worth."""


def balanced(space: Space) -> Space:
    """The rows; those whose layout is BALANCED with the one whose slowest parts take the least time, by the
    closed forms, and only where that is a GAIN over all other layouts."""
    layout = space.columns["layout"]
    rows = np.flatnonzero(layout == BALANCED)
    if not len(rows):
        return space
    chosen, given = layout.copy(), SpaceFacts.of(space)
    for start in range(0, len(rows), BLOCK):
        some = rows[start : start + BLOCK]
        chosen[some] = _fastest(space.take(some), given)
    columns = space.columns | {"layout": chosen}
    return Space(
        space.family, space.problem, taken(columns, np.flatnonzero(chosen != BALANCED)), space.rejected
    )


def _fastest(space: Space, given: SpaceFacts) -> Column:
    """The layout of each row; BALANCED where it is no GAIN over an even one or that of a recipe."""
    one, model, codes = Bounder(space.having(layout=IDEAL), given), space.problem.model, laid(space.columns)
    woven = space.columns["overlap"] == 1
    each = [
        np.where(woven, busy, turn) for busy, turn in zip(one.layer_seconds(), one.in_turn(), strict=True)
    ]
    layers, head = np.stack(each, axis=1), one.head_seconds()
    found = np.empty(len(space), dtype=np.int64)
    for code in np.unique(codes).tolist():
        stages, virtual, _ = parts_of(code)
        others, rows = plain(model, stages, virtual), np.flatnonzero(codes == code)
        tried = np.array(others + lighter(model, stages, virtual))
        every = ((model, stages, virtual, layout) for layout in tried.tolist())
        seconds = np.stack([_seconds(layers[rows], head[rows], *laid) for laid in every])
        seconds[: len(others)] /= 1 + GAIN
        best = seconds.argmin(axis=0)
        found[rows] = np.where(best < len(others), BALANCED, tried[best])
    return found


def _seconds(layers: Reals, head: Reals, model: ModelSpec, stages: int, virtual: int, layout: int) -> Reals:
    """Of a pipeline whose ranks go through their virtual stages in step: of each of these the slowest part.
    layers: of each kind, by row; head: of what is beside the layers, in the last part."""
    found = np.zeros(len(head))
    for times, parts in parts_by_turn(model, stages, virtual, layout):
        found += times * (layers @ parts.T).max(axis=1)
    last = load(model, stages, virtual, layout).parts[:, -1]
    turn = (layers @ last.T).max(axis=1)
    return np.asarray(found - turn + np.maximum(turn, layers @ last[-1] + head))
