"""Bounds of candidates that share their layers, by the pieces of one: closer than the closed forms."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from mopsim.search.bound import Bounder
from mopsim.search.facts import SpaceFacts
from mopsim.search.learn import coded
from mopsim.search.pieces import LAYER, LayerPiece, Pieces
from mopsim.search.problem import Column
from mopsim.search.space import Space
from mopsim.search.stages import IDEAL, kinds, load
from mopsim.search.wires import Reals
from mopsim.search.woven import LAID, RankTime, expected
from mopsim.spec.model import LayerKind


@dataclass(frozen=True)
class Parts:
    """What candidates that share their layers are made of. layers: pieces by kind of layer, the same for all;
    losses: that of each. Of those whose forwards and backwards are woven: rank, of their pipeline, where a
    layout is chosen; as_long: seconds of a layer, expected, for each of one that is not woven."""

    layers: dict[LayerKind, LayerPiece]
    losses: list[LayerPiece]
    rank: RankTime | None = None
    as_long: float = 1.0

    @staticmethod
    def of(pieces: Pieces, given: SpaceFacts, index: int, rows: Column) -> "Parts | None":
        """Of rows that share those of row `index`; None where a rule refuses it."""
        layers = pieces.layers(index)
        losses = [pieces.loss(int(row)) for row in rows]
        known = [one for one in losses if one is not None]
        if layers is None or len(known) < len(losses):
            return None
        row, model = pieces.space.row(index), pieces.space.problem.model
        if not row["overlap"]:
            return Parts(layers, known)
        pair, share = partial(pieces.woven, index), given.hardware.communication_share
        if row["layout"] == IDEAL:
            some = tuple(kinds(model))[-1:]
            return Parts(layers, known, None, expected(pair(some, some), share) / layers[some[0]].chain)
        laid = row["pipeline"], row["virtual_stages"], row["layout"]
        count = round(float(Bounder(pieces.space.part(index, index + 1), given).microbatches[0]))
        rank = RankTime.of(model, laid, count, layers, pair, share)
        return Parts(layers, known, rank, rank.likely / rank.alone if rank.alone else 1.0)


class Refined(Bounder):
    """Of rows that share their parts; of woven ones, the pipeline too."""

    def __init__(self, space: Space, given: SpaceFacts, parts: Parts) -> None:
        super().__init__(space, given)
        self.parts = parts
        self.mtp = self.model.num_nextn_predict_layers

    def time(self) -> Reals:
        """The closed form's, or more: layers and loss in turn, with what each waits for, woven where they
        are; or as long as they compute beside busy fabrics; or as the host issues their kernels. Then the
        optimizer."""
        busy = self._all(lambda piece: piece.busy)
        step = busy + self.hardware.communication_share * self.talks()
        step = np.maximum(step, self._rank() if self.parts.rank else self._all(lambda piece: piece.chain))
        issue = self.hardware.host.cpu_launch_time
        if issue and "step" not in self.space.stack.host.graphs:
            step = np.maximum(step, self._all(lambda piece: piece.issued) * issue.si)
        return np.asarray(np.maximum(super().time(), step + self.optimizer_time() + self.constant()))

    def chain(self) -> Reals:
        """Expected seconds of the slowest rank: layers and loss in turn, woven ones as much shorter as those
        of a middle stage."""
        return self._all(lambda piece: piece.chain, self.parts.as_long)

    def _rank(self) -> Reals:
        """Seconds of the woven rank, with what a microbatch takes on the way there and back and what its
        replicas exchange once a step."""
        rank = self.parts.rank
        assert rank is not None
        laid = (int(self.space.columns[name][0]) for name in ("pipeline", "virtual_stages", "layout"))
        stage, order = load(self.model, *laid), list(kinds(self.model))
        way = float(stage.before[rank.stage] @ [self.parts.layers[kind].chain for kind in order])
        once = np.maximum(*(stage.layers[rank.stage] @ np.stack(one) for one in self.replicas()))
        return np.asarray(rank.least + way + once)

    def _all(self, what: Callable[[LayerPiece], float], factor: float = 1.0) -> Reals:
        """Of the slowest stage: of all its layers and microbatches. factor: of the layers' seconds."""
        times, layers = self.microbatches, self.parts.layers
        head = np.array([what(piece) for piece in self.parts.losses]) * (1 + self.mtp)
        if self.mtp:
            more = what(layers[self.model.layer_kind(self.model.num_hidden_layers)]) * factor
            head = head + self.mtp * more
        return self.slowest([times * what(layers[kind]) * factor for kind in kinds(self.model)], times * head)

    def left(self) -> Reals:
        return np.array([float(self.parts.layers[kind].left) for kind in kinds(self.model)])

    def in_backward(self) -> Reals:
        return np.full(len(self.space), float(min(piece.height for piece in self.parts.layers.values())))

    def in_loss(self) -> Reals:
        return np.array([float(piece.height) for piece in self.parts.losses])


def alike(kept: Space) -> tuple[Column, list[Column]]:
    """(the group of each candidate that shares its parts but the loss, the places of each group)."""
    group = np.zeros(len(kept), dtype=np.int64)
    woven = kept.columns["overlap"]
    for column in [kept.columns[name] for name in LAYER] + [woven * kept.columns[name] for name in LAID]:
        values, codes = coded(column)
        group = np.unique(group * len(values) + codes, return_inverse=True)[1].reshape(-1)
    order = np.argsort(group, kind="stable")
    return group, np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
