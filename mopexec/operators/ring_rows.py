"""Rows of a vocabulary that is split over a ring, for tokens of any of its words: the embedding of a network
whose head it is too. As in the loss (`Ring`) the smaller of both moves: the rows, or the tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mopexec.measure.tracker import category
from mopexec.operators.loss import Ring, Travelling
from mopexec.operators.rows import row_slices


class RowsRing(Ring):
    """A ring that also looks words up."""

    def rows(self, ids: Tensor, block: Tensor) -> Tensor:
        """Rows [N, H] of this place's tokens ids [N]. block: the vocabulary's rows of this place."""
        with category("activations"):
            x = torch.zeros(ids.shape[0], block.shape[1], dtype=block.dtype, device=block.device)
        with category("logits"):
            if self.moves_weights:
                for round_, (here,) in self._rounds([block]):
                    _add_rows(x, ids, here, self._rows(round_)[0])
                    del here
                return x
            for _ in range(self.group.size):
                _add_rows(x, ids, block, self._rows(0)[0])
                with category("activations"):
                    coming = torch.empty_like(x)
                others = torch.empty_like(ids)
                self._hop([x, ids], [coming, others]).wait()
                x, ids = coming, others
                del coming, others
        return x

    def rows_backward(self, ids: Tensor, grad: Tensor, grad_block: Tensor) -> None:
        """grad_block [rows of this place, H] += what the gradients [N, H] of `rows`, of all places' tokens,
        are for them.
        """
        with category("logits"):
            if not self.moves_weights:
                for _, (here, there) in self._rounds([grad, ids]):
                    _add_gradients(grad_block, there, here, self._rows(0)[0])
                    del here, there
                return
            travelling = Travelling(self)
            for round_ in range(self.group.size):
                own = grad_block.new_zeros(self._count(round_), grad_block.shape[1])
                _add_gradients(own, ids, grad, self._rows(round_)[0])
                travelling.join(own, (self._count(round_ + 1), grad_block.shape[1]))
                del own
            travelling.arrive(grad_block)


def _add_rows(x: Tensor, ids: Tensor, block: Tensor, first: int) -> None:
    """x [N, H] += rows of block [n, H], the vocabulary's from `first` on, for ids [N] that are among them."""
    for start, stop in row_slices(x.shape[0]):
        local, outside = _local(ids[start:stop], first, block.shape[0])
        x[start:stop].add_(F.embedding(local, block).masked_fill_(outside, 0.0))


def _add_gradients(table: Tensor, ids: Tensor, grad: Tensor, first: int) -> None:
    """table [n, H], of the vocabulary's rows from `first` on, += the gradient [N, H] of ids among them."""
    for start, stop in row_slices(grad.shape[0]):
        local, outside = _local(ids[start:stop], first, table.shape[0])
        part = grad[start:stop].masked_fill(outside, 0.0).to(table.dtype)
        table.index_put_((local,), part, accumulate=True)


def _local(ids: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """(row of the block [n]; whether the word is in another one [n, 1]). Words of others are spread over its
    rows: what is added to one row is added one after the other.
    """
    local = ids - first
    outside = (local < 0) | (local >= rows)
    return local.remainder_(rows), outside[:, None]
