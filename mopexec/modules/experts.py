"""Expert parallelism under FSDP2: whole experts on Ep ranks, tokens there and back by all-to-all, kept for
the backward.

Per rank: N tokens, R = N * top_k routes. One chunk: dispatched rows, expert intermediates and combined rows
all live until
the backward (or its recompute) has used them, as in the peers that build expert parallelism on FSDP2.
"""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from mopexec.distributed import collectives
from mopexec.distributed.mesh import Group
from mopexec.distributed.tiers import Platform
from mopexec.measure.scope import category
from mopexec.model.moe import RoutedExperts
from mopexec.model.routing import Routing
from mopexec.modules.exchange import exchange
from mopexec.operators.again import once
from mopexec.operators.dispatch import sum_routes, to_ranks
from mopexec.operators.grouped import RowCounts, expert_order
from mopexec.operators.router import count_routes
from mopexec.operators.routes import exchanged
from mopexec.operators.weighted_inputs import spread, spread_backward
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
            (inverse,) = ctx.saved_tensors
            return sum_routes(grads[0], inverse, ctx.top_k), None, None, None


class _SpreadWeighted(torch.autograd.Function):
    """As `_Spread`, each row times the weight of its route; keeps the tokens and the weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights, inverse)
        return spread(x, weights, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with category("dispatch"):
            x, weights, inverse = ctx.saved_tensors
            each = grads[0].index_select(0, inverse).view(*weights.shape, -1)
            return *spread_backward(each, x, weights), None, None


class _SumRoutes(torch.autograd.Function):
    """Rows [R, H] in expert order to the sum of each token's [N, H]: `_Spread` the other way round. What a
    checkpoint makes again is there before the gradients of rows are, and is booked as what it is."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return sum_routes(rows, inverse, top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (order,) = ctx.saved_tensors
        with category("dispatch"):
            return grads[0].index_select(0, order // ctx.top_k), None, None, None


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


def _to_ranks(x: Tensor, received: list[int], sent: list[int], group: Group) -> Tensor:
    return to_ranks(x.contiguous(), received, sent, group)[0]


def apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    """`function.apply`, typed."""
    return cast(Tensor, function.apply(*args))  # type: ignore[no-untyped-call]


def permute(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Rows [R, H] in the order `index`, differentiable."""
    return apply(_Permute, rows, index, inverse)


class ExpertDispatch:
    """A drop-in for `MoE.dispatch`: routes to the ranks that own their experts and back.

    The module holds this rank's num_experts / degree experts; beside: ranks that split them. The host waits
    for the device once, for the counts; under a routing profile it knows them.
    """

    def __init__(
        self,
        routing: Routing,
        num_experts: int,
        group: Group,
        platform: Platform,
        beside: Group | None = None,
    ) -> None:
        self._routing, self._num_experts, self._group = routing, num_experts, group
        self._platform, self._beside = platform, beside if beside and beside.size > 1 else None
        self._stated: tuple[list[int], RowCounts] | None = None

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor, module: RoutedExperts) -> Tensor:
        """x [N, H], experts and weights [N, top_k] to the weighted sum of the experts' outputs [N, H]."""
        num_tokens, top_k = experts.shape
        spread = self._group.size > 1
        with category("dispatch"):
            sent, counts = self._counts(experts)
            received = counts.by_source
            there = partial(_to_ranks, received=received, sent=sent, group=self._group)
            back = partial(_to_ranks, received=sent, sent=received, group=self._group)
            order, inverse = _with_inverse(experts.flatten().argsort(stable=True))
            if module.inputs_weighted:
                rows = apply(_SpreadWeighted, x, weights, order, inverse)
            else:
                rows = apply(_Spread, x, order, inverse, top_k)
            grouped = by_expert(counts)
            if spread:
                rows = exchange(rows, there, back, booked="dispatch", name="dispatch")
            if grouped is not None:
                rows = permute(rows, *grouped)
        rows = module(rows, counts)
        with category("dispatch"):
            if grouped is not None:
                rows = permute(rows, *reversed(grouped))
            if spread:
                rows = exchange(rows, back, there, booked="dispatch", name="combine")
            if module.inputs_weighted:
                return apply(_SumRoutes, rows, order, inverse, top_k)
            rows = permute(rows, inverse, order)  # the name is reused: what came back is freed here
            by_token = rows.view(num_tokens, top_k, -1)
            return torch.bmm(weights.to(by_token.dtype)[:, None, :], by_token).squeeze(1)

    def _counts(self, experts: Tensor) -> tuple[list[int], RowCounts]:
        """Routes that this rank sends to each of the group, and those that it gets."""
        if self._routing.learned:
            return once(lambda: self._exchanged(experts))
        if self._stated is None:
            self._stated = self._said(*experts.shape)
        return self._stated

    def _said(self, num_tokens: int, top_k: int) -> tuple[list[int], RowCounts]:
        """Of the profile, by which every rank sends as many."""
        size, local = self._group.size, self._num_experts // self._group.size
        counts = routing_counts(self._routing.profile, num_tokens, 1, 0, self._num_experts, top_k)
        mine = [list(counts[place * local : (place + 1) * local]) for place in range(size)]
        each = [mine[self._group.place]] * size
        with category("dispatch"):
            found = RowCounts(each, self._platform.upload(each, (size, local)))
            if self._beside is not None:
                same = [found.by_expert] * self._beside.size
                beside = RowCounts(same, self._platform.upload(same, (self._beside.size, local)))
                found = RowCounts(each, found.device, beside)
        return [sum(one) for one in mine], found

    def _exchanged(self, experts: Tensor) -> tuple[list[int], RowCounts]:
        size, local = self._group.size, self._num_experts // self._group.size
        sent = torch.zeros(self._num_experts, dtype=torch.int64, device=experts.device)
        count_routes(sent, experts)
        tables = [sent.view(size, local), exchanged(sent[None], self._group)[0]]
        if self._beside is not None:
            tables.append(sent.new_empty(self._beside.size, local))
            collectives.all_gather_single(tables[2].view(-1), tables[1].sum(0), self._beside.handle)
        values = self._platform.fetch(torch.cat(tables))
        mine, theirs, others = values[:size], values[size : 2 * size], values[2 * size :]
        beside = RowCounts(others, tables[2]) if others else None
        return [sum(counts) for counts in mine], RowCounts(theirs, tables[1], beside)


def _with_inverse(order: Tensor) -> tuple[Tensor, Tensor]:
    """An order [R], and its inverse, int32: both are kept for the backward."""
    inverse = torch.empty_like(order, dtype=torch.int32)
    inverse[order] = torch.arange(order.numel(), dtype=torch.int32, device=order.device)
    return order.to(torch.int32), inverse


def by_expert(counts: RowCounts) -> tuple[Tensor, Tensor] | None:
    """Order (and inverse) that turns rows in blocks [source][expert] into blocks [expert][source]; None where
    the two are the same.
    """
    order = expert_order(counts.device, sum(counts.by_source))
    return None if order is None else _with_inverse(order)
