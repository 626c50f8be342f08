"""Context parallelism by blocks of keys and values: each rank keeps its queries, and gets the keys and values
before them, those of all ranks at once (all-gather) or block after block in a ring (arXiv 2310.01889).

Rank p of n holds positions [p S / n, (p + 1) S / n) of its sequences: its own block is attended causally, the
blocks before it whole, those after it not at all. Blocks are merged by their log-sum-exps; the backward of
each block, given the merged output and sums, is its part of the whole gradient.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from mopexec.distributed import collectives
from mopexec.distributed.mesh import Group
from mopexec.operators.attention_core import Core, Saved, causal_backward, causal_forward
from mopexec.operators.kernels import joins_sums

Pair = tuple[Tensor, Tensor]


def blocks_forward(
    q: Tensor, k: Tensor, v: Tensor, core: Core, group: Group, *, ring: bool
) -> tuple[Tensor, Tensor, dict[int, Saved]]:
    """(out [B, s, heads, e], log-sum-exps [B, heads, s] over all blocks, what else each block's backward
    needs, by place) of q [B, s, heads, d] and contiguous k [B, s, kv_heads, d], v [B, s, kv_heads, e] of this
    rank.
    """
    out, saved = causal_forward(q, k, v, core)
    lse, before, rests = _sums(saved, q), replace(core, causal=False), {group.place: saved[1:]}
    for place, key, value in (_around if ring else _gathered)(k, v, group):
        block, saved = causal_forward(q, key, value, before)
        out, lse = _merged(out, lse, block, _sums(saved, q))
        rests[place] = saved[1:]
    return out, lse, rests


def blocks_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rests: dict[int, Saved],
    core: Core, group: Group, *, ring: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v from that of `out`, those of k and v from the queries of all ranks."""
    before = replace(core, causal=False)

    def block(place: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        saved = _saved(lse, rests[place], q, key)
        how = core if place == group.place else before
        return causal_backward(grad, q, key, value, out, saved, how)[:3]

    return (_ring_backward if ring else _gathered_backward)(k, v, group, block)


def _gathered(k: Tensor, v: Tensor, group: Group) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(place, keys, values) of the blocks before this rank's, of those of all ranks."""
    keys, values = _all(k, group), _all(v, group)
    for place in range(group.place):
        yield place, keys[place], values[place]


def _all(x: Tensor, group: Group) -> Tensor:
    whole = x.new_empty((group.size, *x.shape))
    collectives.all_gather_single(whole.flatten(0, 1), x, group.handle)
    return whole


def _gathered_backward(k: Tensor, v: Tensor, group: Group, block: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v: each rank's part of those of every block, added up where the block is."""
    keys, values = _all(k, group), _all(v, group)
    grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
    grad_q: Tensor | None = None
    for place in range(group.place + 1):
        dq, dk, dv = block(place, keys[place], values[place])
        grad_q = dq if grad_q is None else grad_q.add_(dq)
        grad_keys[place], grad_values[place] = dk, dv
        del dq, dk, dv  # gone before the next block's are made
    assert grad_q is not None
    own = []
    for whole, like in ((grad_keys, k), (grad_values, v)):
        mine = torch.empty_like(like)
        collectives.reduce_scatter_single(mine, whole.flatten(0, 1), group.handle)
        own.append(mine)
    return grad_q, own[0], own[1]


def _hop(tensors: tuple[Tensor, ...], group: Group) -> tuple[tuple[Tensor, ...], collectives.Waitable]:
    """Send tensors to the next rank of the ring; what comes from the one before, once the work is done."""
    coming = tuple(torch.empty_like(tensor) for tensor in tensors)
    return coming, collectives.send_recv(
        tensors, group.next, coming, group.previous, group.handle, async_op=True
    )


def _around(k: Tensor, v: Tensor, group: Group) -> Iterator[tuple[int, Tensor, Tensor]]:
    """As `_gathered`, one block after the other while the next one is on its way."""
    coming, work = _hop((k, v), group)
    for hop in range(1, group.size):
        work.wait()
        key, value = coming
        if hop < group.size - 1:
            coming, work = _hop((key, value), group)
        if hop <= group.place:
            yield group.place - hop, key, value


def _ring_backward(k: Tensor, v: Tensor, group: Group, block: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As `_gathered_backward`: blocks go round with the sums of their gradients, and then home."""
    grad_q, grad_k, grad_v = (x.contiguous() for x in block(group.place, k, v))
    moving: tuple[Tensor, ...] = (k, v, grad_k, grad_v)
    del grad_k, grad_v  # gone once they are sent
    for hop in range(1, group.size + 1):
        home = hop == group.size
        coming, work = _hop(moving[2:] if home else moving, group)
        work.wait()
        moving = coming
        if not home and hop <= group.place:
            dq, dk, dv = block(group.place - hop, moving[0], moving[1])
            grad_q.add_(dq)
            moving[2].add_(dk)
            moving[3].add_(dv)
            del dq, dk, dv
    return grad_q, moving[-2], moving[-1]


def _sums(saved: Saved, q: Tensor) -> Tensor:
    """Log-sum-exps [B, heads, s] of what `causal_forward` saves."""
    if joins_sums(q):
        return cast(Tensor, saved[0])
    return torch.stack(saved, dim=2).flatten(1, 2)


def _saved(lse: Tensor, rest: Saved, q: Tensor, k: Tensor) -> Saved:
    """What `causal_backward` wants, with other log-sum-exps."""
    if joins_sums(q):
        return (lse, *rest)
    heads = k.shape[2]
    return tuple(one.contiguous() for one in lse.unflatten(1, (heads, -1)).unbind(2))  # type: ignore[no-untyped-call]


def _merged(out: Tensor, lse: Tensor, block: Tensor, sums: Tensor) -> Pair:
    """Outputs [B, s, heads, e] over two sets of keys as one over both, and their log-sum-exps."""
    total = torch.logaddexp(lse, sums)
    first, second = ((one - total).exp_().transpose(1, 2)[..., None] for one in (lse, sums))
    return (out * first + block * second).to(out.dtype), total
