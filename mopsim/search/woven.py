"""Forwards of a pipeline rank woven with backwards of other microbatches: what one rank takes for all, and
what it holds."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from mopsim.search.flow import Alone
from mopsim.search.pieces import LayerPiece, Pieces, PipelinePart
from mopsim.search.stages import layers_of, load
from mopsim.spec.layout import stage_layers
from mopsim.spec.model import ModelSpec
from mopsim.spec.pipeline_order import turns

LAID = ("overlap", "pipeline", "virtual_stages", "layout")
"""Columns that the turns of a rank depend on, where forwards and backwards are woven."""
NONE = PipelinePart()


@dataclass(frozen=True)
class Turn:
    """What a rank issues together: a forward through the layers of one part of the pipeline, a backward
    through those of another one, or both. whole: nothing else is between them (reductions, MTP layers)."""

    ahead: PipelinePart
    back: PipelinePart
    whole: bool


@dataclass(frozen=True)
class RankTime:
    """Seconds of the passes of the rank of a stage, its compute stream's: at least, and expected."""

    stage: int
    least: float
    likely: float

    @staticmethod
    def of(
        pieces: Pieces, index: int, laid: tuple[int, int, int], microbatches: int, stage: int
    ) -> "RankTime":
        """Of a row that no rule refuses. laid: (stages, virtual stages, layout)."""
        least = likely = 0.0
        for turn, times in rank_turns(pieces.space.problem.model, laid, microbatches, stage).items():
            ahead = _passes(pieces, index, turn.ahead)
            back = _passes(pieces, index, turn.back)
            apart = [sum(one.forward.chain for one in ahead), sum(one.backward.chain for one in back)]
            if not (ahead and back):
                paced = [one.forward.paced for one in ahead] + [one.backward.paced for one in back]
                least, likely = least + times * sum(apart), likely + times * sum(paced)
                continue
            woven = pieces.woven(index, turn.ahead, turn.back)
            busy = sum(one.compute[0].all for one in ahead) + sum(one.compute[1].all for one in back)
            more = max(0.0, busy - woven.busy)  # of what is not in the pair
            least += times * (woven.chain if turn.whole else max(*apart, busy))
            slowed = sum(one.ahead.slowed for one in ahead) + sum(one.back.slowed for one in back)
            likely += times * (expected(woven, busy, slowed) + more)
        return RankTime(stage, least, likely)


def expected(woven: Alone, busy: float, slowed: float) -> float:
    """Seconds of a pair. busy, slowed: those of its compute alone and beside exchanges."""
    return woven.paced + (1 - busy / slowed) * max(0.0, woven.talks - (woven.paced - woven.busy))


def woven_height(
    pieces: Pieces, index: int, laid: tuple[int, int, int], microbatches: int, stage: int
) -> float:
    """Device bytes of activations that a stage has, at least, in its first turn of a forward and a backward;
    0 where it has none."""
    model, layers, embedding = pieces.space.problem.model, pieces.layers(index), pieces.embedding(index)
    before, turn = first_pair(model, laid, microbatches, stage)
    if turn is None or layers is None or embedding is None:
        return 0.0
    away = embedding.left if pieces.inputs(index) != "device" else 0
    kept = sum(layers[kind].left - away for part in before for kind in part.kinds)
    loss = pieces.loss(index) if any(part.last for part in before) else None
    kept += sum(part.last for part in before) * (loss.left if loss else 0)
    return float(kept + pieces.woven(index, turn.ahead, turn.back).height)


def fullest(model: ModelSpec, laid: tuple[int, int, int], microbatches: int) -> int:
    """The stage of most layers, with those on the way there and back; laid: as in `RankTime.of`."""
    stages = load(model, *laid)
    return int(np.argmax((stages.layers + stages.before / microbatches).sum(axis=1)))


@cache
def rank_turns(
    model: ModelSpec, laid: tuple[int, int, int], microbatches: int, stage: int
) -> Mapping[Turn, int]:
    """How often a stage has each turn in a step."""
    return Counter(_in_order(model, laid, microbatches, stage))


@cache
def first_pair(
    model: ModelSpec, laid: tuple[int, int, int], microbatches: int, stage: int
) -> tuple[tuple[PipelinePart, ...], Turn | None]:
    """(The parts whose forwards a stage has behind it, its turn) as it has its first forward and backward
    together; None where it has none."""
    behind: list[PipelinePart] = []
    for turn in _in_order(model, laid, microbatches, stage):
        if turn.back != NONE:
            return tuple(behind), turn if turn.ahead != NONE and turn.whole else None
        behind.append(turn.ahead)
    return tuple(behind), None


def _in_order(model: ModelSpec, laid: tuple[int, int, int], microbatches: int, stage: int) -> list[Turn]:
    stages, virtual, layout = laid
    given = layers_of(model, stages, virtual, layout) or ()
    layers = stage_layers(model.num_hidden_layers, stages, virtual, stage, given)
    parts = [
        PipelinePart(
            tuple(model.layer_kind(layer) for layer in part),
            (stage, place) == (0, 0),
            (stage, place) == (stages - 1, virtual - 1),
        )
        for place, part in enumerate(layers)
    ]
    found = []
    for turn in turns("interleaved", stages, virtual, microbatches, stage, 1):
        ahead, back, whole = NONE, NONE, True
        for phase, microbatch, place in turn:
            part = parts[place]
            whole = whole and not (part.last and model.num_nextn_predict_layers)
            if phase == "forward":
                ahead = part
            else:
                back = PipelinePart(part.kinds[::-1], part.first, part.last)
                whole = whole and microbatch < microbatches - 1
        found.append(Turn(ahead, back, whole))
    return found


def _passes(pieces: Pieces, index: int, part: PipelinePart) -> list[LayerPiece]:
    """What passes through a part are made of, one after the other; without the embedding."""
    layers, model = pieces.layers(index), pieces.space.problem.model
    assert layers is not None, "a row that a rule refuses"
    found = [layers[kind] for kind in part.kinds]
    loss, mtp = pieces.loss(index) if part.last else None, model.num_nextn_predict_layers
    if loss is not None:
        extra = layers[model.layer_kind(model.num_hidden_layers)] if mtp else loss
        found += [*[loss] * (1 + mtp), *[extra] * mtp]
    return found
