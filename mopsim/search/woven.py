"""Forwards of a pipeline rank woven with backwards of other microbatches, and what one rank takes for all."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from mopsim.search.pieces import Alone, LayerPiece
from mopsim.search.stages import layers_of, load
from mopsim.spec.layout import stage_layers
from mopsim.spec.model import LayerKind, ModelSpec
from mopsim.spec.pipeline_order import turns

LAID = ("overlap", "pipeline", "virtual_stages", "layout")
"""Columns that the turns of a rank depend on, where forwards and backwards are woven."""
Kinds = tuple[LayerKind, ...]
Pair = Callable[[Kinds, Kinds], Alone]
"""A forward through layers of some kinds woven with a backward through others."""


@dataclass(frozen=True)
class Turn:
    """What a rank issues together: a forward through the layers of one part of the pipeline, a backward
    through those of another one, or both. whole: nothing else is between them (embedding, loss, reductions).
    """

    ahead: Kinds
    back: Kinds
    whole: bool


@dataclass(frozen=True)
class RankTime:
    """Seconds of the passes of the rank of a middle stage, its compute stream's: at least, and expected.

    stage: of the rank. alone: those of its layers one after the other, nothing woven.
    """

    stage: int
    least: float
    likely: float
    alone: float

    @staticmethod
    def of(
        model: ModelSpec,
        laid: tuple[int, int, int],
        microbatches: int,
        pieces: Mapping[LayerKind, LayerPiece],
        pair: Pair,
        share: float,
    ) -> "RankTime":
        """laid: (stages, virtual stages, layout). share: of the compute that an exchange takes beside it."""
        stage = _fullest(model, *laid)
        least = likely = alone = 0.0
        for turn, times in _turns(model, laid, microbatches, stage).items():
            ahead = [pieces[kind].forward for kind in turn.ahead]
            back = [pieces[kind].backward for kind in turn.back]
            apart = [sum(one.chain for one in some) for some in (ahead, back)]
            alone += times * sum(apart)
            if not (ahead and back):
                least, likely = least + times * sum(apart), likely + times * sum(apart)
                continue
            woven = pair(turn.ahead, turn.back)
            busy = sum(one.busy for one in (*ahead, *back))
            least += times * (woven.chain if turn.whole else max(*apart, busy))
            likely += times * expected(woven, share)
        return RankTime(stage, least, likely, alone)


def expected(woven: Alone, share: float) -> float:
    """Seconds of a pair. share: of the compute that an exchange takes beside it."""
    return woven.chain + share * max(0.0, woven.talks - (woven.chain - woven.busy))


@cache
def _fullest(model: ModelSpec, stages: int, virtual: int, layout: int) -> int:
    """The stage of most layers but the first and the last, where there are others."""
    layers = load(model, stages, virtual, layout).layers.sum(axis=1)
    middle = layers[1:-1] if stages > 2 else layers
    return int(np.argmax(middle)) + (stages > 2)


@cache
def _turns(model: ModelSpec, laid: tuple[int, int, int], microbatches: int, stage: int) -> Counter[Turn]:
    """How often a stage has each turn in a step."""
    stages, virtual, layout = laid
    given = layers_of(model, stages, virtual, layout) or ()
    layers = stage_layers(model.num_hidden_layers, stages, virtual, stage, given)
    kinds = [tuple(model.layer_kind(layer) for layer in part) for part in layers]
    found: Counter[Turn] = Counter()
    for turn in turns("interleaved", stages, virtual, microbatches, stage, 1):
        whole, ahead, back = True, Kinds(), Kinds()
        for phase, microbatch, part in turn:
            edge = (stage, part) in ((0, 0), (stages - 1, virtual - 1))
            whole = whole and not edge
            if phase == "forward":
                ahead = kinds[part]
            else:
                back = kinds[part][::-1]
                whole = whole and microbatch < microbatches - 1
        found[Turn(ahead, back, whole)] += 1
    return found
