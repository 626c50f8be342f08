"""Bounds of candidates that share their layers, by the pieces of one: closer than the closed forms."""

from collections.abc import Callable

import numpy as np

from mopsim.search.bound import Bounder
from mopsim.search.facts import SpaceFacts
from mopsim.search.pieces import LayerPiece
from mopsim.search.space import Space
from mopsim.search.stages import kinds
from mopsim.search.wires import Reals
from mopsim.spec.model import LayerKind


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
        return self.slowest(layers, times * head)

    def left(self) -> Reals:
        return np.array([float(self.pieces[kind].left) for kind in kinds(self.model)])

    def in_backward(self) -> Reals:
        return np.full(len(self.space), float(min(piece.height for piece in self.pieces.values())))

    def in_loss(self) -> Reals:
        return np.array([float(piece.height) for piece in self.losses])
