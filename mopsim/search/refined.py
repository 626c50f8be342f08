"""Bounds of candidates that share their layers, by the pieces of one: closer than the closed forms."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from mopsim.search.bound import Bounder
from mopsim.search.facts import SpaceFacts
from mopsim.search.flow import Alone
from mopsim.search.footprint import LAST, SLOTS
from mopsim.search.learn import codes
from mopsim.search.pieces import LAYER, LOSS, LayerPiece, Pieces, PipelinePart
from mopsim.search.problem import NEXT_FORWARD, Column
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
    def of(pieces: Pieces, index: int) -> "WovenRank":
        row, model = pieces.space.row(index), pieces.space.problem.model
        laid = row["pipeline"], row["virtual_stages"], row["layout"]
        count = round(float(pieces.space.part(index, index + 1).microbatches()[0]))
        last = laid[0] - 1
        stages = sorted({fullest(model, laid, count), last})
        times = tuple(RankTime.of(pieces, index, laid, count, stage) for stage in stages)
        ends = {0: 0, LAST: last} if last else {0: 0}
        heights = {name: woven_height(pieces, index, laid, count, stage) for name, stage in ends.items()}
        return WovenRank(times, heights)


@dataclass(frozen=True)
class Shared:
    """What candidates that share their layers are made of. layers: pieces by kind of layer; wires: adds up
    the bytes of communicators. Of those whose forwards and backwards are woven: ranks, of their pipelines,
    and those of each, where a layout is chosen; as_long: seconds of a layer, expected, for each of one that
    is not woven, where none is."""

    layers: dict[LayerKind, LayerPiece]
    wires: Callable[[], int]
    ranks: tuple[list[WovenRank], Column] | None = None
    as_long: float = 1.0

    @staticmethod
    def of(pieces: Pieces, rows: Column) -> "Shared | None":
        """None where a rule refuses them."""
        first = int(rows[0])
        layers, wires = pieces.layers(first), partial(pieces.wires, first)
        if layers is None:
            return None
        row, model = pieces.space.row(first), pieces.space.problem.model
        if not row["overlap"]:
            return Shared(layers, wires)
        if row["layout"] == IDEAL:
            some = tuple(kinds(model))[-1:]
            woven, piece = pieces.woven(first, PipelinePart(some), PipelinePart(some)), layers[some[0]]
            long = expected(woven, piece.busy, piece.slowed) / piece.paced
            return Shared(layers, wires, None, long)
        one, place = _distinct(pieces.space, rows, (*LOSS, "boundary_parts"))
        return Shared(layers, wires, ([WovenRank.of(pieces, int(row)) for row in rows[one]], place))


@dataclass(frozen=True)
class Parts:
    """What rows are made of that share their layers in groups. groups, counts: what the rows of each share,
    and how many they are, one group after the other; losses, loss: pieces, and that of each row."""

    groups: list[Shared]
    counts: list[int]
    losses: list[LayerPiece]
    loss: Column

    def each(self, what: Callable[[Shared], float]) -> Reals:
        """Something of the group of each row."""
        return np.repeat([what(one) for one in self.groups], self.counts)


class Refined(Bounder):
    """Of rows that share their parts in groups; of woven ones, the pipeline too."""

    def __init__(self, space: Space, given: SpaceFacts, parts: Parts) -> None:
        super().__init__(space, given)
        self.parts = parts
        self.mtp = self.model.num_nextn_predict_layers
        self.ranked = parts.each(lambda one: float(one.ranks is not None)) > 0
        """Whether a row is woven over a layout that is chosen."""

    @staticmethod
    def of(pieces: Pieces, given: SpaceFacts, groups: Sequence[Column]) -> "tuple[Refined | None, list[int]]":
        """(Those of the rows of groups, one group after the other; the places of the groups), less what a
        rule refuses."""
        rows = np.concatenate(groups)
        one, place = _distinct(pieces.space, rows, LOSS)
        losses = [pieces.loss(int(row)) for row in rows[one]]
        ends = np.cumsum([len(rows) for rows in groups])
        mine = np.split(place, ends[:-1])
        kept: list[int] = []
        found: list[Shared] = []
        for at, group in enumerate(groups):
            legal = all(losses[int(loss)] is not None for loss in np.unique(mine[at]))
            shared = Shared.of(pieces, group) if legal else None
            if shared is not None:
                kept.append(at)
                found.append(shared)
        if not kept:
            return None, kept
        used, loss = np.unique(np.concatenate([mine[at] for at in kept]), return_inverse=True)
        own = [piece for at in used if (piece := losses[int(at)]) is not None]
        parts = Parts(found, [len(groups[at]) for at in kept], own, loss.reshape(-1))
        every = pieces.space.take(np.concatenate([groups[at] for at in kept]))
        return Refined(every, given, parts), kept

    def time(self) -> Reals:
        """Layers and loss in turn, with what each waits for, woven where they are; or as long as they compute
        beside busy fabrics; or as the host issues their kernels. Then the optimizer. A closed form may be
        more, where streams are busy for longer."""
        busy = self.with_copies(*self._parts(lambda piece: piece.busy))
        idle, alone = self.awaited(), busy + self.updates()
        step = busy + idle + self.hardware.communication_share * np.maximum(self.talks() - idle, 0.0)
        chain = np.maximum(
            self._all(lambda piece: piece.chain) + idle,
            np.where(self.c["pipeline"] == 1, self._phases(), 0.0),
        )
        step = np.maximum(step, np.where(self.ranked, self._ranks(lambda rank: rank.least), chain))
        host = self._all(lambda piece: piece.issued, filled=np.where(self.sent_beside(), 0.0, 1.0))
        step = np.maximum.reduce([step, alone, host + idle])
        return np.asarray(step + self.optimizer_time() + self.constant())

    def _phases(self) -> Reals:
        """Seconds of forwards, losses and backwards, each as long as its chain or as a fabric is busy with
        the weights gathered for it, its exchanges, and what it reduces. Gathers that may begin before it, and
        the reductions of the last layer, which end after it, are left out. Flat units open a layer's
        gradients once those of the layer before are reduced, beside what is between their experts."""
        weights, layers, c = self.weights(), self.model.num_hidden_layers, self.c
        if not weights:
            return np.zeros(len(self.space))
        flat, prefetch = self.flat, self.prefetch
        inside, last = max(0.0, 1 - (0 if flat else prefetch + 1) / layers), 1 - 1 / layers
        gathers = [one * inside / self.gathers() for one in self.busy(weights[::2])]
        first = self.gathers() - c["reshard"]
        reduced = [one * last for one in self.busy(weights[1::2])]
        ahead = self._sum(lambda piece: [piece.forward])
        back = self._sum(lambda piece: [piece.backward])
        forward = np.maximum.reduce(
            [ahead[0], *(way + first * one for way, one in zip(ahead[1:], gathers, strict=True))]
        )
        busy = [
            way + c["reshard"] * one + other
            for way, one, other in zip(back[1:], gathers, reduced, strict=True)
        ]
        backward = np.maximum.reduce([back[0], *busy])
        forward = forward + np.maximum(self._updated() - forward / self.microbatches, 0.0)
        pairs = (piece for group in self.parts.groups for piece in group.layers.values())
        if flat and all(len(piece.parts) > 2 for piece in pairs):  # else other rows are no flat units
            experts = self._sum(lambda piece: [piece.parts[1]])[0]
            chain, *fabrics = self._sum(lambda piece: [piece.parts[0], piece.parts[2]])
            between = [way * last + one for way, one in zip(fabrics, reduced, strict=True)]
            backward = np.maximum(backward, experts + np.maximum.reduce([chain, *between]))
        back = backward + self._head(lambda piece: piece.chain)
        return np.asarray(forward + back + np.maximum(self._updated_early() - back / self.microbatches, 0.0))

    def _updated(self) -> Reals:
        """Seconds for which the layers' state goes up beside the first forward, whose last layer waits for
        its update: all but that layer's, and what the staging buffers had before."""
        c, sizes, (dense, routed) = self.c, self.sizes, self.states
        layers = dense * (sizes.dense - sizes.embedding) / (sizes.dense + sizes.head) + routed
        late = layers * (1 - 1 / self.model.num_hidden_layers) - SLOTS * c["bucket"]
        each = (c["beside"] == NEXT_FORWARD) * self.streamed * self.copied("h2d", duplex=True)
        return np.asarray(np.maximum(late, 0.0) * each)

    def _updated_early(self) -> Reals:
        """The same of all state beside the last microbatch's loss and backward."""
        late = sum(self.states) - SLOTS * self.c["bucket"]
        each = self.early * self.state_away * self.streamed * self.copied("h2d", duplex=True)
        return np.asarray(np.maximum(late, 0.0) * each)

    def _sum(self, what: Callable[[LayerPiece], Sequence[Alone]]) -> tuple[Reals, Reals, Reals]:
        """(chain, scale-up, scale-out) seconds of something of all layers, all microbatches."""
        each = np.zeros((3, len(self.parts.groups)))
        for kind, count in kinds(self.model).items():
            for place, group in enumerate(self.parts.groups):
                for one in what(group.layers[kind]):
                    each[:, place] += np.multiply(count, (one.chain, one.up, one.out))
        found = np.repeat(each, self.parts.counts, axis=1) * self.microbatches
        return found[0], found[1], found[2]

    def chain(self) -> Reals:
        """Expected seconds of the slowest rank: layers and loss in turn, woven as they are, or as the
        host issues their kernels."""
        long = self.parts.each(lambda one: one.as_long)
        apart = self._all(lambda piece: piece.paced, long)
        return np.asarray(np.where(self.ranked, self._ranks(lambda rank: rank.likely), apart))

    def taken(self) -> Reals:
        """Of the compute of layers and loss, what collectives beside it take."""
        return np.asarray(1 - self._all(lambda piece: piece.busy) / self._all(lambda piece: piece.slowed))

    def _ranks(self, what: Callable[[RankTime], float]) -> Reals:
        """Seconds of the slowest of some ranks, woven over a layout that is chosen, with what a microbatch
        takes on the way there and back and what its replicas exchange once a step."""
        return self._woven(lambda rows, shared: self._group_ranks(rows, shared, what))

    def _group_ranks(self, rows: slice, shared: Shared, what: Callable[[RankTime], float]) -> Reals:
        """The same of rows that share their parts."""
        assert shared.ranks is not None
        ranks, place = shared.ranks
        laid = (int(self.space.columns[name][rows][0]) for name in ("pipeline", "virtual_stages", "layout"))
        stages, order = load(self.model, *laid), list(kinds(self.model))
        chains = [shared.layers[kind].chain for kind in order]
        found = np.zeros(len(place))
        for times in zip(*(rank.times for rank in ranks), strict=True):
            stage = times[0].stage
            once = np.maximum(
                *(stages.layers[stage] @ np.stack([kind[rows] for kind in one]) for one in self.exchanged)
            )
            mine = np.array([what(one) for one in times])[place]
            found = np.maximum(found, mine + float(stages.before[stage] @ chains) + once)
        return found

    def _woven(self, find: Callable[[slice, Shared], Reals]) -> Reals:
        """Something of the rows that are woven over a layout that is chosen, group by group; 0 of others."""
        found, start = np.zeros(len(self.space)), 0
        for shared, count in zip(self.parts.groups, self.parts.counts, strict=True):
            rows = slice(start, start + count)
            found[rows] = find(rows, shared) if shared.ranks else 0.0
            start += count
        return found

    def above(self, stage: int) -> Reals:
        """Or what the first forward and backward have together, woven."""

        def heights(rows: slice, shared: Shared) -> Reals:
            assert shared.ranks is not None
            ranks, place = shared.ranks
            return np.array([rank.heights.get(stage, 0.0) for rank in ranks])[place]

        return np.maximum(super().above(stage), self._woven(heights))

    def _all(
        self, what: Callable[[LayerPiece], float], factor: Reals | float = 1.0, filled: Reals | float = 1.0
    ) -> Reals:
        """Of the slowest stage: of all its layers and microbatches. factor: of the layers' seconds. filled:
        as in `slowest_stage`."""
        return self.slowest(*self._parts(what, factor), filled)

    def _parts(
        self, what: Callable[[LayerPiece], float], factor: Reals | float = 1.0
    ) -> tuple[list[Reals], Reals]:
        """(Of each kind of layer, all microbatches; of the losses and of MTP layers)."""
        every = [self.microbatches * self._layer(kind, what) * factor for kind in kinds(self.model)]
        return every, self._head(what, factor)

    def _layer(self, kind: LayerKind, what: Callable[[LayerPiece], float]) -> Reals:
        return self.parts.each(lambda one: what(one.layers[kind]))

    def _head(self, what: Callable[[LayerPiece], float], factor: Reals | float = 1.0) -> Reals:
        """Of the losses and of MTP layers, all microbatches."""
        head = self._loss(what) * (1 + self.mtp)
        if self.mtp:
            more = self._layer(self.model.layer_kind(self.model.num_hidden_layers), what)
            head = head + self.mtp * more * factor
        return np.asarray(self.microbatches * head)

    def _loss(self, what: Callable[[LayerPiece], float]) -> Reals:
        return np.array([float(what(piece)) for piece in self.parts.losses])[self.parts.loss]

    @cached_property
    def left(self) -> Reals:
        return np.stack([self._layer(kind, lambda piece: piece.left) for kind in kinds(self.model)], axis=1)

    @cached_property
    def in_backward(self) -> Reals:
        """With the weights that each part of the backward has gathered, and their gradients."""
        heights = []
        for kind in kinds(self.model):
            parts = [
                self._layer(kind, lambda piece, part=part: _height(piece, part)) + own  # type: ignore[misc]
                for part, own in enumerate(self._own(kind))
            ]
            heights.append(np.max(parts, axis=0))
        return np.asarray(np.min(heights, axis=0))

    def _own(self, kind: LayerKind) -> list[Reals]:
        """Bytes of the gathered weights and full gradients of a layer under ZeRO-3 in each part of its
        backward (mopsim.search.pieces), and of weights gathered ahead, where these do not stay gathered."""
        stack = self.space.stack
        zero3 = (self.c["zero"] == 3) & (stack.sharding.groups != "each")  # there one by one
        used = np.where(zero3, self.c["reshard"] * self.sent * self.by_layer, 0.0)
        dense, routed = (full * used for full in self._full(kind))
        grads = np.where(zero3, np.add(*self._full(kind)), 0.0)
        if not (self.flat or stack.sharding.copies):
            return [dense + routed + grads * self.grad] * 2
        ahead = min(self.prefetch, self.model.num_hidden_layers - 1)
        least = np.min([np.add(*self._full(other)) for other in kinds(self.model)], axis=0) * used
        dense = dense + np.where(self.c["pipeline"] == 1, ahead, 0) * least
        if (
            not self.flat
        ):  # experts are freed before the rest goes on, whether they were gathered again or not
            stayed = np.where(zero3, (1 - self.c["reshard"]) * self.sent * self.by_layer, 0.0)
            return [dense + routed, dense - self._full(kind)[1] * stayed]
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

    @cached_property
    def in_loss(self) -> Reals:
        return self._loss(lambda piece: piece.height)

    def communicators(self) -> Reals:
        """Bytes of the communicators of layers' exchanges."""
        return self.parts.each(lambda one: one.wires())


def _height(piece: LayerPiece, part: int) -> float:
    """The most that a part of its backward has above its start; minus infinity where it has no such part."""
    return float(piece.heights[part]) if part < len(piece.heights) else -np.inf


def _distinct(space: Space, rows: Column, names: Sequence[str]) -> tuple[Column, Column]:
    """(Places of one of the rows for each combination of values of some columns; the combination of each)."""
    some = space.take(rows)
    combination = codes([*(some.columns[name] for name in names), *some.within()], len(rows))
    return np.unique(combination, return_index=True)[1], combination


def alike(kept: Space) -> tuple[Column, list[Column]]:
    """(the group of each candidate that shares its parts but the loss, the places of each group)."""
    c, woven = kept.columns, kept.columns["overlap"]
    laid = (woven * c[name] for name in LAID)
    group = codes([*(c[name] for name in LAYER), *laid, *kept.within()], len(kept))
    order = np.argsort(group, kind="stable")
    return group, np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
