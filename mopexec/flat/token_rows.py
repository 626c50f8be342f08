"""Rows of the embedding, and of learned positions, for tokens; where embedding and head share a weight, its
one gradient is open from the loss to the end of the backward.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from mopexec.flat.units import Unit
from mopexec.measure.tracker import component, phase
from mopexec.operators.learned_positions import add_positions, positions_backward
from mopexec.operators.ring_rows import RowsRing
from mopexec.operators.rows import row_slices

_TABLE, _POSITIONS = "embedding.weight", "embedding.positions"


@dataclass
class TokenRows:
    """embedding: the vocabulary's matrix, whole or, with a ring, this place's rows of it. positions: None
    where the network learns none. shared: whether the matrix is the head's too.
    """

    embedding: Unit
    positions: Unit | None
    ring: RowsRing | None
    shared: bool

    @property
    def units(self) -> list[Unit]:
        return [self.embedding, *([] if self.positions is None else [self.positions])]

    def forward(self, tokens: Tensor, ids: Tensor | None = None) -> Tensor:
        """Rows [N, H] for tokens [B, s]; with ids at their learned positions."""
        units = self.units if ids is not None else [self.embedding]
        with component("embedding"):
            for unit in units:
                unit.gather()
            table = self.embedding.weights()[_TABLE]
            flat = tokens.flatten()
            x = F.embedding(flat, table) if self.ring is None else self.ring.rows(flat, table)
            del table
            self.embedding.release()
            if ids is not None:
                assert self.positions is not None
                rows, places = x.view(*tokens.shape, -1), self.positions.weights()[_POSITIONS]
                x = add_positions(rows, places, ids).view_as(x)
                del rows, places
                self.positions.release()
        return x

    def backward(self, tokens: Tensor, grad: Tensor, ids: Tensor | None = None, *, last: bool) -> list[Unit]:
        """From the gradient [N, H] of `forward`; returns the units whose gradients are on their way then.
        last: of a microbatch.
        """
        with component("embedding"), phase("backward"):
            self._add(tokens.flatten(), grad)
            units = [] if self.shared and not last else [self.embedding]
            if ids is not None:
                assert self.positions is not None
                places = self.positions.open_grads()[_POSITIONS]
                positions_backward(places, grad.view(*tokens.shape, -1), ids)
                del places
                units.append(self.positions)
            for unit in units:
                unit.reduce()
        return units

    def _add(self, tokens: Tensor, grad: Tensor) -> None:
        table = self.embedding.opened_grads()[_TABLE]
        if self.ring is not None:
            self.ring.rows_backward(tokens, grad, table)
            return
        for start, stop in row_slices(grad.shape[0]):
            table.index_put_((tokens[start:stop],), grad[start:stop].to(table.dtype), accumulate=True)
