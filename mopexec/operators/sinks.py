"""Attention sinks (arXiv 2508.10925): a logit of each head in the softmax that no value belongs to.

With l the log-sum-exp over keys and s the sink, the log-sum-exp over both is l' = log(e^l + e^s), and the
output is e^(l - l') times the one without a sink. A flash backward that is given l' and that output finds the
gradients of queries, keys and values: its probabilities are e^(product - l').
"""

from typing import Any

import torch
from torch import Tensor

from mopexec.operators.kernels import joins_sums


def join_(out: Tensor, saved: tuple[Any, ...], sinks: Tensor) -> tuple[Any, ...]:
    """Scale out [B, S, heads, d] in place; returns what is saved with the log-sum-exps over keys and sinks.

    saved: log-sum-exps [B, kv_heads, S] of each query head of a KV head (CPU), or [B, heads, S] first.
    """
    if joins_sums(out):
        joined = torch.logaddexp(saved[0], sinks.to(saved[0].dtype)[:, None])
        out.mul_((saved[0] - joined).exp_().transpose(1, 2)[..., None])
        return (joined, *saved[1:])
    repeats = len(saved)
    parts = out.view(*out.shape[:2], -1, repeats, out.shape[-1])
    found = []
    for index, lse in enumerate(saved):
        joined = torch.logaddexp(lse, sinks[index::repeats].to(lse.dtype)[:, None])
        parts[:, :, :, index].mul_((lse - joined).exp_().transpose(1, 2)[..., None])
        found.append(joined)
    return tuple(found)


def backward(grad: Tensor, out: Tensor, saved: tuple[Any, ...], sinks: Tensor) -> Tensor:
    """Gradient [heads] of the sinks: - sum over positions of e^(s - l') <grad, out>, as the sink's value is
    zero.
    """
    product = (grad * out).sum(-1, dtype=saved[0].dtype).transpose(1, 2)
    joined = saved[0] if joins_sums(out) else torch.stack(saved, dim=2).flatten(1, 2)
    share = (sinks.to(joined.dtype)[:, None] - joined).exp_()
    return share.mul_(product).sum((0, 2)).neg_().to(sinks.dtype)
