"""Attention in dtypes that no fused kernel of a GPU takes: one block of query rows after the other, as torch
composes it. Saves log-sum-exps as flash kernels do, so that blocks of keys and sinks are merged by them.

Shapes: q [B, S, heads, d], k [B, T, kv_heads, d], v [B, T, kv_heads, e]. Query heads that share keys are
rows of one product, so that no keys are expanded. Runs on every device.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from mopsim.spec.layout import ATTENTION_ROWS

Saved = tuple[Any, ...]


class Visible(Protocol):
    """What of `attention_core.Core` says which keys a query sees."""

    @property
    def scale(self) -> float: ...
    @property
    def window(self) -> int: ...
    @property
    def causal(self) -> bool: ...


def forward(q: Tensor, k: Tensor, v: Tensor, core: Visible) -> tuple[Tensor, Saved]:
    """(out [B, S, heads, e], (log-sum-exps [B, heads, S],)), both in the dtype of q."""
    batch, length, heads, _ = q.shape
    out = q.new_empty((batch, length, heads, v.shape[3]))
    sums = q.new_empty((batch, heads, length))
    for index, rows, keys, hidden in _blocks(q, k, core):
        key, value = k[index, keys].transpose(0, 1), v[index, keys].transpose(0, 1)
        scores = _scores(_joined(q[index, rows], k), key, hidden, core)
        del hidden
        top = scores.amax(-1, keepdim=True)
        total = scores.sub_(top).exp_().sum(-1, keepdim=True)
        part = torch.bmm(scores, value).div_(total)
        del scores
        _apart(out[index, rows], k).copy_(part.view(_apart(out[index, rows], k).shape))
        sums[index, :, rows].copy_(top.add_(total.log_()).view(heads, -1))
        del part, top, total
    return out, (sums,)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved, core: Visible
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v. out, saved: over more keys than these where others are merged with them."""
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for index, rows, keys, hidden in _blocks(q, k, core):
        key, value = k[index, keys].transpose(0, 1), v[index, keys].transpose(0, 1)
        given = _joined(grad[index, rows], k)
        shift = (given * _joined(out[index, rows], k)).sum(-1, keepdim=True)
        query = _joined(q[index, rows], k)
        shares = _scores(query, key, hidden, core)
        del hidden
        shares.sub_(saved[0][index, :, rows].reshape(shift.shape)).exp_()
        grad_v[index, keys].transpose(0, 1).baddbmm_(shares.transpose(1, 2), given)
        grads = torch.bmm(given, value.transpose(1, 2)).sub_(shift).mul_(shares)
        del shares, shift, given
        grad_k[index, keys].transpose(0, 1).baddbmm_(grads.transpose(1, 2), query, alpha=core.scale)
        del query
        part = torch.bmm(grads, key).mul_(core.scale)
        del grads
        _apart(grad_q[index, rows], k).copy_(part.view(_apart(grad_q[index, rows], k).shape))
        del part
    return grad_q, grad_k, grad_v


def _blocks(q: Tensor, k: Tensor, core: Visible) -> Iterator[tuple[int, slice, slice, Tensor | None]]:
    """(sequence, query rows, keys that any of them sees, which of these are hidden [rows, keys])."""
    length, window = q.shape[1], core.window if core.causal else 0
    for index in range(q.shape[0]):
        for start in range(0, length, ATTENTION_ROWS):
            stop = min(start + ATTENTION_ROWS, length)
            if not core.causal:
                yield index, slice(start, stop), slice(0, k.shape[1]), None
                continue
            first = max(0, start - window + 1) if window else 0
            rows, keys = slice(start, stop), slice(first, stop)
            yield index, rows, keys, _hidden(rows, keys, window, q.device)


def _hidden(rows: slice, keys: slice, window: int, device: torch.device) -> Tensor:
    seen = torch.ones((rows.stop - rows.start, keys.stop - keys.start), dtype=torch.bool, device=device)
    ahead = rows.start - keys.start
    seen.tril_(ahead)  # no keys ahead, and none that the window has left
    if window:
        seen.triu_(ahead - window + 1)
    return seen.logical_not_()


def _scores(query: Tensor, key: Tensor, hidden: Tensor | None, core: Visible) -> Tensor:
    """[kv_heads, repeats * rows, keys] of query [kv_heads, repeats * rows, d] and key [kv_heads, keys, d]."""
    scores = query.new_empty((*query.shape[:2], key.shape[1]))
    scores.baddbmm_(query, key.transpose(1, 2), beta=0, alpha=core.scale)
    if hidden is not None:
        by_repeat = scores.view(scores.shape[0], -1, hidden.shape[0], scores.shape[2])
        by_repeat.masked_fill_(hidden, float("-inf"))
    return scores


def _apart(x: Tensor, k: Tensor) -> Tensor:
    """x [rows, heads, d] as a view [kv_heads, repeats, rows, d]."""
    return x.view(x.shape[0], k.shape[2], -1, x.shape[2]).permute(1, 2, 0, 3)


def _joined(x: Tensor, k: Tensor) -> Tensor:
    """x [rows, heads, d] as [kv_heads, repeats * rows, d]; a view where no heads share keys."""
    return _apart(x, k).flatten(1, 2)
