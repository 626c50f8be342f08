"""Bounds of candidates that share their layers, by the pieces of one: closer than the closed forms."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mopsim.search.bound import Bounder
from mopsim.search.facts import SpaceFacts
from mopsim.search.flow import Alone
from mopsim.search.footprint import LAST, SLOTS, microbatches
from mopsim.search.learn import coded
from mopsim.search.pieces import LAYER, LOSS, LayerPiece, Pieces, PipelinePart
from mopsim.search.problem import Column
from mopsim.search.space import Space
from mopsim.search.stages import IDEAL, kinds, load
from mopsim.search.wires import Reals
from mopsim.search.woven import LAID, RankTime, expected, fullest, woven_height
from mopsim.spec.model import LayerKind


@dataclass(frozen=True)
class WovenRank:
    """Of the woven programs of a candidate: the times of the ranks that may be the slowest, of most layers
    and the last; heights: bytes of activations that a stage has at least, by its number, -1 for the last."""

    times: tuple[RankTime, ...]
    heights: dict[int, float]

    @staticmethod
    def of(pieces: Pieces, given: SpaceFacts, index: int) -> "WovenRank":
        row, model = pieces.space.row(index), pieces.space.problem.model
        laid = row["pipeline"], row["virtual_stages"], row["layout"]
        count = round(float(microbatches(pieces.space.part(index, index + 1))[0]))
        last, share = laid[0] - 1, given.hardware.communication_share
        stages = sorted({fullest(model, laid, count), last})
        times = tuple(RankTime.of(pieces, index, laid, count, stage, share) for stage in stages)
        ends = {0: 0, LAST: last} if last else {0: 0}
        heights = {name: woven_height(pieces, index, laid, count, stage) for name, stage in ends.items()}
        return WovenRank(times, heights)


@dataclass(frozen=True)
class Parts:
    """What candidates that share their layers are made of. layers: pieces by kind of layer, the same for all;
    losses: that of each. Of those whose forwards and backwards are woven: ranks, of the pipeline of each,
    where a layout is chosen; as_long: seconds of a layer, expected, for each of one that is not woven, where
    none is."""

    layers: dict[LayerKind, LayerPiece]
    losses: list[LayerPiece]
    ranks: list[WovenRank] | None = None
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
        if row["layout"] == IDEAL:
            some = tuple(kinds(model))[-1:]
            woven = pieces.woven(index, PipelinePart(some), PipelinePart(some))
            return Parts(
                layers,
                known,
                None,
                expected(woven, given.hardware.communication_share) / layers[some[0]].chain,
            )
        ranks: dict[tuple[int, ...], WovenRank] = {}
        keys = [pieces.key(int(one), (*LOSS, "boundary_parts")) for one in rows]
        for key, one in zip(keys, rows, strict=True):
            if key not in ranks:
                ranks[key] = WovenRank.of(pieces, given, int(one))
        return Parts(layers, known, [ranks[key] for key in keys])


class Refined(Bounder):
    """Of rows that share their parts; of woven ones, the pipeline too."""

    def __init__(self, space: Space, given: SpaceFacts, parts: Parts) -> None:
        super().__init__(space, given)
        self.parts = parts
        self.mtp = self.model.num_nextn_predict_layers

    def time(self) -> Reals:
        """Layers and loss in turn, with what each waits for, woven where they are; or as long as they compute
        beside busy fabrics; or as the host issues their kernels. Then the optimizer. A closed form may be
        more, where streams are busy for longer."""
        busy = self._all(lambda piece: piece.busy) + self.copies()
        idle = self.awaited()
        step = busy + idle + self.hardware.communication_share * np.maximum(self.talks() - idle, 0.0)
        if self.parts.ranks is None:
            step = np.maximum(step, self._all(lambda piece: piece.chain) + idle)
            step = np.maximum(step, np.where(self.c["pipeline"] == 1, self._phases(), 0.0))
        else:
            step = np.maximum(step, self._ranks(self.parts.ranks, lambda rank: rank.least))
        issue = self.hardware.host.cpu_launch_time
        if issue and "step" not in self.space.stack.host.graphs:
            step = np.maximum(step, self._all(lambda piece: piece.issued) * issue.si + idle)
        return np.asarray(step + self.optimizer_time() + self.constant())

    def _phases(self) -> Reals:
        """Seconds of forwards, losses and backwards, each as long as its chain or as a fabric is busy with
        the weights gathered for it, its exchanges, and what it reduces. Gathers that may begin before it, and
        the reductions of the last layer, which end after it, are left out. Flat units open a layer's
        gradients once those of the layer before are reduced, beside what is between their experts."""
        weights, layers, c = self.weights(), self.model.num_hidden_layers, self.c
        if not weights:
            return np.zeros(len(self.space))
        flat, prefetch = self.flat, self.space.build(0).dense.prefetch
        inside, last = max(0.0, 1 - (0 if flat else prefetch + 1) / layers), 1 - 1 / layers
        gathers = [one * inside / (c["reshard"] + 1) for one in self.busy(weights[::2])]
        reduced = [one * last for one in self.busy(weights[1::2])]
        ahead = self._sum(lambda piece: [piece.forward])
        back = self._sum(lambda piece: [piece.backward])
        forward = np.maximum.reduce([ahead[0], *map(np.add, ahead[1:], gathers)])
        busy = [
            way + c["reshard"] * one + other
            for way, one, other in zip(back[1:], gathers, reduced, strict=True)
        ]
        backward = np.maximum.reduce([back[0], *busy])
        forward = forward + np.maximum(self._updated() - forward / self.microbatches, 0.0)
        if flat:
            experts = self._sum(lambda piece: [piece.parts[1]])[0]
            chain, *fabrics = self._sum(lambda piece: [piece.parts[0], piece.parts[2]])
            between = [way * last + one for way, one in zip(fabrics, reduced, strict=True)]
            backward = np.maximum(backward, experts + np.maximum.reduce([chain, *between]))
        return np.asarray(forward + backward + self._head(lambda piece: piece.chain))

    def _updated(self) -> Reals:
        """Seconds for which the layers' state goes up beside the first forward, whose last layer waits for
        its update: all but that layer's, and what the staging buffers had before."""
        c, sizes, (dense, routed) = self.c, self.sizes, self.states()
        layers = dense * (sizes.dense - sizes.embedding) / (sizes.dense + sizes.head) + routed
        late = layers * (1 - 1 / self.model.num_hidden_layers) - SLOTS * c["bucket"]
        each = c["beside"] * self.streamed * self.copied("h2d", duplex=True)
        return np.asarray(np.maximum(late, 0.0) * each)

    def _sum(self, what: Callable[[LayerPiece], Sequence[Alone]]) -> tuple[Reals, Reals, Reals]:
        """(chain, scale-up, scale-out) seconds of something of all layers, all microbatches."""
        found = np.zeros((3, len(self.space)))
        for kind, count in kinds(self.model).items():
            for one in what(self.parts.layers[kind]):
                found += count * np.outer((one.chain, one.up, one.out), self.microbatches)
        return found[0], found[1], found[2]

    def chain(self) -> Reals:
        """Expected seconds of the slowest rank: layers and loss in turn, woven as they are."""
        if self.parts.ranks is None:
            return self._all(lambda piece: piece.chain, self.parts.as_long)
        return self._ranks(self.parts.ranks, lambda rank: rank.likely)

    def _ranks(self, ranks: list[WovenRank], what: Callable[[RankTime], float]) -> Reals:
        """Seconds of the slowest of some woven ranks, with what a microbatch takes on the way there and back
        and what its replicas exchange once a step."""
        laid = (int(self.space.columns[name][0]) for name in ("pipeline", "virtual_stages", "layout"))
        stages, order = load(self.model, *laid), list(kinds(self.model))
        chains = [self.parts.layers[kind].chain for kind in order]
        found = np.zeros(len(self.space))
        for times in zip(*(rank.times for rank in ranks), strict=True):
            stage = times[0].stage
            once = np.maximum(*(stages.layers[stage] @ np.stack(one) for one in self.exchanged))
            mine = np.array([what(one) for one in times]) + float(stages.before[stage] @ chains) + once
            found = np.maximum(found, mine)
        return found

    def above(self, stage: int) -> Reals:
        """Or what the first forward and backward have together, woven."""
        found = super().above(stage)
        if self.parts.ranks is None:
            return found
        return np.maximum(found, [rank.heights.get(stage, 0.0) for rank in self.parts.ranks])

    def _all(self, what: Callable[[LayerPiece], float], factor: float = 1.0) -> Reals:
        """Of the slowest stage: of all its layers and microbatches. factor: of the layers' seconds."""
        times, layers = self.microbatches, self.parts.layers
        every = [times * what(layers[kind]) * factor for kind in kinds(self.model)]
        return self.slowest(every, self._head(what, factor))

    def _head(self, what: Callable[[LayerPiece], float], factor: float = 1.0) -> Reals:
        """Of the losses and of MTP layers, all microbatches."""
        head = np.array([what(piece) for piece in self.parts.losses]) * (1 + self.mtp)
        if self.mtp:
            more = self.parts.layers[self.model.layer_kind(self.model.num_hidden_layers)]
            head = head + self.mtp * what(more) * factor
        return np.asarray(self.microbatches * head)

    def left(self) -> Reals:
        return np.array([float(self.parts.layers[kind].left) for kind in kinds(self.model)])

    def in_backward(self) -> Reals:
        """With the weights that each part of the backward has gathered, and their gradients."""
        every = self.parts.layers
        heights = [
            np.max(
                [most + own for most, own in zip(every[kind].heights, self._own(kind), strict=False)], axis=0
            )
            for kind in kinds(self.model)
        ]
        return np.asarray(np.min(heights, axis=0))

    def _own(self, kind: LayerKind) -> list[Reals]:
        """Bytes of the gathered weights and full gradients of a layer under ZeRO-3 in each part of its
        backward (mopsim.search.pieces), and of weights gathered ahead, where these do not stay gathered."""
        stack, zero3 = self.space.stack, self.c["zero"] == 3
        used = np.where(zero3, self.c["reshard"] * self.compute, 0.0)
        dense, routed = (full * used for full in self._full(kind))
        grads = np.where(zero3, np.add(*self._full(kind)), 0.0)
        if not (self.flat or stack.sharding.copies):
            return [dense + routed + grads * self.grad] * 2
        ahead = min(self.space.build(0).dense.prefetch, self.model.num_hidden_layers - 1)
        least = np.min([np.add(*self._full(other)) for other in kinds(self.model)], axis=0) * used
        dense = dense + np.where(self.c["pipeline"] == 1, ahead, 0) * least
        if not self.flat:
            return [dense + routed, dense]
        grads = grads * self.reduce
        return [dense + routed, dense + routed + grads, dense + grads]

    def _full(self, kind: LayerKind) -> tuple[Reals, Reals]:
        """Parameters of a layer that are gathered: (of all but experts, of experts)."""
        c, (dense, routed) = self.c, self.sizes.layers[kind]
        apart = c["experts"] * c["expert_tensor"]
        return (
            np.where(c["dense_shard"] > 1, dense / c["tensor"], 0.0),
            np.where(c["expert_shard"] > 1, routed / apart, 0.0),
        )

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
