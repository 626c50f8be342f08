"""Expert parallelism under FSDP2: whole experts on Ep ranks, tokens there and back by all-to-all, kept for
the backward.

Per rank: N tokens, R = N * top_k routes. One chunk: dispatched rows, expert intermediates and combined rows
all live until
the backward (or its recompute) has used them, as in the peers that build expert parallelism on FSDP2.
"""

from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mopexec.distributed import collectives
from mopexec.measure.scope import category
from mopexec.model.routing import Routing
from mopexec.modules.exchange import exchange
from mopsim.spec.routing import routing_counts


class _Spread(torch.autograd.Function):
    """Tokens [N, H] to one row per route in expert order [R, H]; backward sums a token's routes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return x.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with category("dispatch"):
            rows = grads[0].index_select(0, *ctx.saved_tensors)
            return rows.view(-1, ctx.top_k, rows.shape[1]).sum(1), None, None, None


class _Permute(torch.autograd.Function):
    """Rows [R, H] in the order `index`; backward by its inverse, without atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with category("dispatch"):
            return grads[0].index_select(0, *ctx.saved_tensors), None, None


def _to_ranks(x: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Row blocks to the ranks of the group."""
    out = x.new_empty(sum(received), *x.shape[1:])
    collectives.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


def apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    """`function.apply`, typed."""
    return cast(Tensor, function.apply(*args))  # type: ignore[no-untyped-call]


def permute(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Rows [R, H] in the order `index`, differentiable."""
    return apply(_Permute, rows, index, inverse)


class ExpertDispatch:
    """A drop-in for `MoE.dispatch`: routes to the ranks that own their experts and back.

    The module holds this rank's num_experts / degree experts. Under a routing profile every split is a
    Python int.
    """

    def __init__(
        self, routing: Routing, num_experts: int, degree: int, group: dist.ProcessGroup | None, place: int
    ) -> None:
        self._routing, self._num_experts, self._degree = routing, num_experts, degree
        self._group, self._place = group, place

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor, module: nn.Module) -> Tensor:
        """x [N, H], experts and weights [N, top_k] to the weighted sum of the experts' outputs [N, H]."""
        num_tokens, top_k = experts.shape
        with category("dispatch"):
            mine, theirs = self._counts(experts)
            sent, received = [sum(counts) for counts in mine], [sum(counts) for counts in theirs]
            there = partial(_to_ranks, received=received, sent=sent, group=self._group)
            back = partial(_to_ranks, received=sent, sent=received, group=self._group)
            order, inverse = _sorting(experts.flatten())
            rows = apply(_Spread, x, order, inverse, top_k)
            grouped = by_expert(theirs, x.device)
            if self._degree > 1:
                rows = exchange(rows, there, back, booked="dispatch")
            if grouped is not None:
                rows = permute(rows, *grouped)
        rows = module(rows, [sum(counts) for counts in zip(*theirs, strict=True)])
        with category("dispatch"):
            if grouped is not None:
                rows = permute(rows, *reversed(grouped))
            if self._degree > 1:
                rows = exchange(rows, back, there, booked="dispatch")
            rows = permute(rows, inverse, order)  # the name is reused: what came back is freed here
            by_token = rows.view(num_tokens, top_k, -1)
            return torch.bmm(weights.to(by_token.dtype)[:, None, :], by_token).squeeze(1)

    def _counts(self, experts: Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """Routes by [rank of the group][that rank's experts] that this rank sends, and by [rank][my
        experts] it gets."""
        local = self._num_experts // self._degree
        if not self._routing.learned:
            num_tokens, top_k = experts.shape
            counts = routing_counts(self._routing.profile, num_tokens, 1, 0, self._num_experts, top_k)
            mine = [list(counts[place * local : (place + 1) * local]) for place in range(self._degree)]
            return mine, [mine[self._place]] * self._degree
        sent = torch.bincount(experts.flatten(), minlength=self._num_experts)
        if self._degree == 1:
            both = [sent.tolist()]
            return both, both
        received = torch.empty_like(sent)
        collectives.all_to_all_single(received, sent, group=self._group)
        mine, theirs = torch.stack((sent, received)).view(2, self._degree, local).tolist()
        return mine, theirs


def _sorting(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The stable order that sorts keys [R], and its inverse, int32: both are kept for the backward."""
    order = keys.argsort(stable=True)
    inverse = torch.empty_like(order, dtype=torch.int32)
    inverse[order] = torch.arange(order.numel(), dtype=torch.int32, device=order.device)
    return order.to(torch.int32), inverse


def by_expert(counts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Order (and inverse) that turns rows in blocks [rank][expert] of counts rows into blocks [expert][rank].

    None where the two are the same.
    """
    if len(counts) == 1 or len(counts[0]) == 1:
        return None
    flat = [count for row in counts for count in row]
    experts = torch.arange(len(counts[0]), device=device).repeat(len(counts))
    repeats = torch.tensor(flat, device=device)
    return _sorting(torch.repeat_interleave(experts, repeats, output_size=sum(flat)))
