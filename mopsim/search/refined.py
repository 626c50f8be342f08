"""Bounds of candidates that share their layers, by the pieces of one: closer than the closed forms."""

from collections.abc import Callable

import numpy as np

from mopsim.search.bound import Bounder
from mopsim.search.facts import SpaceFacts
from mopsim.search.pieces import LayerPiece
from mopsim.search.space import Space
from mopsim.search.stages import kinds, load, under_way
from mopsim.search.wires import Reals
from mopsim.spec.model import LayerKind

LAST = -1
"""The last stage of a pipeline, as an index."""


class Refined(Bounder):
    """layers: pieces by kind of layer, the same for all rows; losses: that of each row."""

    def __init__(
        self, space: Space, given: SpaceFacts, layers: dict[LayerKind, LayerPiece], losses: list[LayerPiece]
    ) -> None:
        super().__init__(space, given)
        self.pieces, self.losses = layers, losses
        self.mtp = self.model.num_nextn_predict_layers

    def time(self) -> Reals:
        """The closed form's, or more: layers and loss in turn, with what each waits for; or as long as they
        compute beside busy fabrics; or as the host issues their kernels. Then the optimizer."""
        busy = self._all(lambda piece: piece.busy)
        step = busy + self.hardware.communication_share * self.talks()
        woven = self.c["overlap"] == 1
        step = np.maximum(step, np.where(woven, 0.0, self._all(lambda piece: piece.chain)))
        issue = self.hardware.host.cpu_launch_time
        if issue and "step" not in self.space.stack.host.graphs:
            step = np.maximum(step, self._all(lambda piece: piece.issued) * issue.si)
        return np.asarray(np.maximum(super().time(), step + self.optimizer_time() + self.constant()))

    def _all(self, what: Callable[[LayerPiece], float]) -> Reals:
        """Of the slowest stage: of all its layers and microbatches."""
        times = self.microbatches
        head = np.array([what(piece) for piece in self.losses]) * (1 + self.mtp)
        if self.mtp:
            head = head + self.mtp * what(self.pieces[self.model.layer_kind(self.model.num_hidden_layers)])
        layers = [times * what(self.pieces[kind]) for kind in kinds(self.model)]
        return self.slowest_stage(layers, times * head)

    def device_memory(self) -> tuple[Reals, dict[str, Reals]]:
        """The closed form's, or more: what one of the first stages or the last holds when its first backward,
        or the first loss, is at its height."""
        least, parts = super().device_memory()
        height = min(piece.height for piece in self.pieces.values())
        loss = np.array([float(piece.height) for piece in self.losses])
        one = self.c["pipeline"] == 1
        early = parts["grads"] * (self.microbatches > 1) if self.fully_shard else parts["grads"]
        resident = parts["params"] + parts["optimizer"] + early
        for stage in (0, 1, 2, LAST):
            top = loss if stage == LAST else np.maximum(np.where(one, loss, 0.0), height)
            held = self._held(resident, stage) + self._kept(stage) + top
            there = self.c["pipeline"] > (max(stage, 1) if stage else 0)
            least = np.maximum(least, np.where(there, held, 0.0))
        return least, parts

    def _kept(self, stage: int) -> Reals:
        """Bytes that the forwards before leave on the device."""
        model, c = self.model, self.c
        codes = np.stack(
            [c["pipeline"], c["virtual_stages"], c["layout"], self.microbatches, c["overlap"]], axis=1
        ).astype(np.int64)
        values, places = np.unique(codes, axis=0, return_inverse=True)
        many = np.array(
            [
                under_way(model, stages, virtual, layout, count, stage % stages, ahead)
                for stages, virtual, layout, count, ahead in values.tolist()
            ]
        )[places.reshape(-1)]
        left = np.array([float(self.pieces[kind].left) for kind in kinds(model)])
        row = self.tokens / c["tensor"] * model.hidden_size * self.compute
        layers = many.sum(axis=1)
        return np.asarray(many @ left - self.away * layers * row)

    def _held(self, resident: Reals, stage: int) -> Reals:
        """Bytes of weights, gradients and optimizer state of a stage, and of all weights
        that stay gathered until the backward."""
        c, sizes = self.c, self.sizes
        dense, routed = (np.array([sizes.layers[kind][at] for kind in kinds(self.model)]) for at in (0, 1))
        count = self._stage_layers(stage)
        edge = {0: sizes.embedding, LAST: sizes.head}.get(stage, 0)
        below = self.replicated(count @ dense + edge, count @ routed)
        spread = c["experts"] * c["expert_tensor"]
        kept = np.where(c["dense_shard"] > 1, count @ dense, 0.0)
        kept = kept + np.where(c["expert_shard"] > 1, count @ routed / spread, 0.0)
        gathered = np.where(c["reshard"] == 0, kept, 0.0) * self.compute
        return np.asarray(np.where(c["zero"] == 3, resident + gathered, below))

    def _stage_layers(self, stage: int) -> Reals:
        """Layers of each kind of a stage (of one by its place modulo their number)."""
        c = self.c
        codes = np.stack([c["pipeline"], c["virtual_stages"], c["layout"]], axis=1).astype(np.int64)
        values, places = np.unique(codes, axis=0, return_inverse=True)
        found = [load(self.model, *code).layers[stage % code[0]] for code in values.tolist()]
        return np.asarray(np.array(found)[places.reshape(-1)])
