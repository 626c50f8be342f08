"""Weights of routes that multiply the inputs of their experts, not the outputs (Llama 4).

Experts get rows w h, and what they make of them is summed as it is. From the gradients g of these rows: that
of h is the sum of w g over a token's routes, that of a weight is <g, h>. So neither the outputs nor the
weighted rows are needed, and a weight is never divided by.
"""

import torch
from torch import Tensor

from mopexec.operators.dtypes import wide


def weigh_(rows: Tensor, weights: Tensor) -> None:
    """Rows [R, H] *= weights [R], which become 1: packed, they travel as if they multiplied the outputs."""
    rows.mul_(weights[:, None])
    weights.fill_(1)


def spread(x: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    """Weighted rows [R, H] of x [N, H] for the routes of `order`; weights [N, top_k]."""
    rows = x.index_select(0, order // weights.shape[1])
    return rows.mul_(weights.flatten().index_select(0, order)[:, None])


def spread_backward(grads: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x [N, H] and of weights [N, top_k] from those of the weighted rows, [N, top_k, H]."""
    of_weights = torch.bmm(grads, x[:, :, None]).squeeze(2)
    return torch.bmm(weights[:, None, :].to(grads.dtype), grads).squeeze(1), of_weights.to(weights.dtype)


def take_weighted_(
    grad_weights: Tensor, rows: Tensor, x: Tensor, weights: Tensor, inverse: Tensor, top_k: int
) -> Tensor:
    """`spread_backward` in one kernel: rows [R, H] at the places `inverse` [n * top_k] of tokens x [n, H];
    grad_weights [n, top_k] = the gradients of weights [n, top_k]. Returns that of x."""
    gathered = rows[inverse].view(-1, top_k, rows.shape[1])
    accurate = wide(rows.dtype)
    grad_weights.copy_((gathered * x[:, None]).sum(-1, dtype=accurate))
    return (gathered * weights[:, :, None]).sum(1, dtype=accurate).to(rows.dtype)
