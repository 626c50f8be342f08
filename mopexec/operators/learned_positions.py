"""Learned positions (arXiv 1706.03762, 3.5): rows of a table, added to the embeddings of tokens."""

import torch
from torch import Tensor

from mopexec.operators.documents import Documents, positions


def position_ids(start: int, stop: int, device: torch.device, documents: Documents = ()) -> Tensor:
    """Rows of the table for positions [start, stop): [stop - start] int64; with documents, in which positions
    restart, of each sequence [B, stop - start].
    """
    if documents:
        return positions(documents, start, stop, device)
    return torch.arange(start, stop, device=device)


def add_positions(x: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """x [B, S, H] and its rows of the table [P, H], a new tensor; ids of `position_ids`."""
    return x + table[ids]


def positions_backward(grad_table: Tensor, grad: Tensor, ids: Tensor) -> None:
    """grad_table [P, H] += the gradient of the table from that of the sum, [B, S, H]."""
    if ids.dim() == 1:  # each row once
        grad_table.index_add_(0, ids, grad.sum(0, dtype=grad_table.dtype))
    else:
        grad_table.index_put_((ids,), grad.to(grad_table.dtype), accumulate=True)
