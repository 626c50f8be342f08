"""The MoE half of a layer: strided chunks through a pipeline dispatch(i+1) | experts(i) | combine(i-1), and
its backward.

x2 = x1 + sum over routes of weight * expert(norm(x1)) + shared experts(norm(x1)). The weight travels with the
token and is applied at the expert, so combining is a sum. The backward sends inputs and output gradients
again, chunk by chunk, and recomputes gate and up only: the output of an expert is not needed, since <dy, a W>
= <dy W^T, a>.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mopexec.measure.tracker import category, component, phase
from mopexec.operators import expert_products, kernels
from mopexec.operators.dispatch import Arrival, ChunkExchange, sum_routes
from mopexec.operators.dtypes import wide
from mopexec.operators.ffn import add_shared_, shared_backward, slice_rows
from mopexec.operators.fused import OPS, split_packed
from mopexec.operators.least_loaded import Foreign
from mopexec.operators.routes import RoutePlanner, Routes
from mopexec.operators.rows import add_matmul, rms_norm, rms_norm_backward_, row_slices
from mopexec.operators.swiglu import (
    Clamp,
    clamp_of,
    clamped_activation,
    clamped_activation_backward,
    swiglu_activation,
    swiglu_activation_backward,
)
from mopsim.spec.layout import FUSED_ROWS, SLICE_ROWS
from mopsim.spec.model import ModelSpec

Weights = dict[str, Tensor]


@dataclass
class _Chunk:
    """A chunk on its way to the experts: packed rows, and in the backward output gradients."""

    exchange: ChunkExchange
    rows: list[Arrival]


@dataclass
class _Return:
    """A chunk's results on their way home: token rows, and in the backward the gradients of the route
    weights.
    """

    index: int
    exchange: ChunkExchange
    rows: Arrival


class MoEBlock:
    """Experts of every MoE layer for one microbatch shape. shared_tokens: tokens per slice of the shared
    experts.
    """

    def __init__(self, spec: ModelSpec, planner: RoutePlanner, shared_tokens: int) -> None:
        self.spec, self.planner, self.shared_tokens = spec, planner, shared_tokens
        self.num_chunks, self.clamp = planner.num_chunks, clamp_of(spec)

    def forward_(
        self, x: Tensor, routes: Routes, route_weights: Tensor, weights: Weights, experts: Weights,
        foreign: Foreign | None = None,
    ) -> None:  # fmt: skip
        """x1 [N, H] becomes x2 in place; route_weights [N, top_k]; weights of the layer's dense unit, experts
        of its expert unit, foreign those of others that rows here need.
        """
        returning: list[_Return] = []
        exchanges = self._exchanges(routes)
        coming = [self._dispatch(0, exchanges, x, route_weights, weights, None)]
        for index in range(self.num_chunks):
            self._add_shared(index, x, weights)
            exchange, rows = self._receive(coming.pop())
            if index + 1 < self.num_chunks:
                coming.append(self._dispatch(index + 1, exchanges, x, route_weights, weights, None))
            with component("experts"):
                held = [experts, *(foreign.weights() if foreign else ())]
                if foreign is None and expert_products.fits(rows[0], experts):
                    expert_products.forward(rows, routes.ends[index], experts, self.clamp)
                else:
                    rows[0], of_rows = split_packed(rows[0], x.shape[1])
                    experts_forward_(rows[0], of_rows, exchange.counts, held, self.clamp)
                    del of_rows
            if returning:
                self._combine(returning.pop(), x)
            returning.append(self._send_back(index, exchange, rows, None))
        self._combine(returning.pop(), x)

    def backward(
        self, grad: Tensor, x: Tensor, routes: Routes, weights: Weights, experts: Weights, grads: Weights,
        expert_grads: Weights, foreign: Foreign | None = None,
    ) -> None:  # fmt: skip
        """grad [N, H] of x2 becomes that of x1 in place; x is x1; grads and expert_grads += the weights'."""
        returning: list[_Return] = []
        with phase("backward"):
            route_weights = self.planner.weights(x, routes.experts, weights)
            exchanges = self._exchanges(routes)
            with category("dispatch"):
                grad_weights = torch.empty_like(route_weights)
            coming = [self._dispatch(0, exchanges, x, route_weights, weights, grad)]
            held_grads = [expert_grads, *(foreign.open_grads() if foreign else ())]
            for index in range(self.num_chunks):
                self._shared_backward(index, grad, x, weights, grads)
                exchange, rows = self._receive(coming.pop())
                if index + 1 < self.num_chunks:
                    coming.append(self._dispatch(index + 1, exchanges, x, route_weights, weights, grad))
                with component("experts"):
                    held = [experts, *(foreign.weights() if foreign else ())]
                    if foreign is None and expert_products.fits(rows[0], experts):
                        of_rows = expert_products.backward(
                            rows, routes.ends[index], experts, expert_grads, self.clamp
                        )
                    else:
                        inputs, of_rows = split_packed(rows.pop(0), x.shape[1])
                        of_rows = experts_backward_(
                            rows[0], inputs, of_rows, exchange.counts, held, held_grads, self.clamp
                        )
                        del inputs
                if returning:
                    self._combine_backward(returning.pop(), grad, grad_weights, x, weights, grads)
                returning.append(self._send_back(index, exchange, rows, of_rows))
                del of_rows
            self._combine_backward(returning.pop(), grad, grad_weights, x, weights, grads)
            del exchanges, exchange, route_weights
            self.planner.backward_(grad, grad_weights, x, routes.experts, weights, grads)

    def _exchanges(self, routes: Routes) -> list[ChunkExchange]:
        with component("router"), category("dispatch"):
            return ChunkExchange.of(self.planner.group, routes)

    def _rows(self, x: Tensor, index: int) -> Tensor:
        """The tokens of strided chunk `index`: a view [c, H]."""
        return x[index :: self.num_chunks]

    def _dispatch(
        self, index: int, exchanges: list[ChunkExchange], x: Tensor, route_weights: Tensor, weights: Weights,
        grad: Tensor | None,
    ) -> _Chunk:  # fmt: skip
        """Send a chunk's tokens and route weights (and, in the backward, output gradients) to the experts."""
        exchange, tokens = exchanges[index], self._rows(x, index)
        scale, eps = weights["ffn_norm.weight"], self.spec.rms_norm_eps
        given = None if grad is None else self._rows(grad, index)
        own, top_k = self._rows(route_weights, index), self.spec.num_experts_per_tok
        if kernels.NOW.norm:
            with component("experts"), category("dispatch"):
                rows = OPS.pack_routes(tokens, scale, eps, given, own, exchange.order, top_k)
                return _Chunk(exchange, [exchange.start(rows.pop(0)) for _ in range(len(rows))])
        with component("router"):
            hidden = rms_norm(tokens, scale, eps)
        with component("experts"), category("dispatch"):
            rows = OPS.pack_routes(hidden, None, eps, given, own, exchange.order, top_k)
            del hidden
            return _Chunk(exchange, [exchange.start(rows.pop(0)) for _ in range(len(rows))])

    def _receive(self, chunk: _Chunk) -> tuple[ChunkExchange, list[Tensor]]:
        """A chunk's rows at the experts, in a list, to free them early; what was sent is freed."""
        with component("experts"), category("dispatch"):
            return chunk.exchange, [arrival.take() for arrival in chunk.rows]

    def _send_back(
        self, index: int, exchange: ChunkExchange, owned: list[Tensor], grad_weights: Tensor | None
    ) -> _Return:
        """Send a chunk's only remaining rows home; empties `owned`."""
        with component("experts"), category("dispatch"):
            return _Return(index, exchange, exchange.start_back(owned, grad_weights))

    def _combine(self, returned: _Return, x: Tensor) -> None:
        """x1 += the sum of each token's routes, for the tokens of the chunk."""
        with component("experts"), category("dispatch"):
            rows, target, inverse = (
                returned.rows.take(),
                self._rows(x, returned.index),
                returned.exchange.inverse,
            )
            if kernels.NOW.rows:
                OPS.add_routes_(target, rows, inverse, self.spec.num_experts_per_tok)
                return
            for start, stop in row_slices(target.shape[0]):
                target[start:stop].add_(self._sum_routes(rows, inverse, start, stop))

    def _combine_backward(
        self,
        returned: _Return,
        grad: Tensor,
        grad_weights: Tensor,
        x: Tensor,
        weights: Weights,
        grads: Weights,
    ) -> None:
        """Gradients of a chunk's tokens from their routes, through the norm, into grad; those of their route
        weights into grad_weights [N, top_k].
        """
        top_k, inverse = self.spec.num_experts_per_tok, returned.exchange.inverse
        tokens, target, own = (self._rows(one, returned.index) for one in (x, grad, grad_weights))
        with component("experts"), category("dispatch"):
            rows, of_weights = returned.rows.take_weighted()
            if not kernels.NOW.rows:
                own.copy_(of_weights.index_select(0, inverse).view(own.shape))
        for start, stop in row_slices(target.shape[0], FUSED_ROWS if kernels.NOW.rows else SLICE_ROWS):
            with component("experts"), category("dispatch"):
                if kernels.NOW.rows:
                    places = inverse[start * top_k : stop * top_k]
                    grad_hidden = OPS.take_routes_(own[start:stop], rows, of_weights, places, top_k)
                else:
                    grad_hidden = self._sum_routes(rows, inverse, start, stop)
            with component("router"):
                self._norm_backward(target[start:stop], tokens[start:stop], grad_hidden, weights, grads)

    def _sum_routes(self, rows: Tensor, inverse: Tensor, start: int, stop: int) -> Tensor:
        """Sum over the routes of tokens [start, stop): [stop - start, H]."""
        top_k = self.spec.num_experts_per_tok
        return sum_routes(rows, inverse[start * top_k : stop * top_k], top_k)

    def _add_shared(self, index: int, x: Tensor, weights: Weights) -> None:
        """x1 += shared experts, for the tokens of the chunk (they have been sent already)."""
        if not self.spec.shared_expert_intermediate_size:
            return
        with component("shared_experts"):
            for rows in slice_rows(self._rows(x, index), self.shared_tokens):
                hidden = rms_norm(rows, weights["ffn_norm.weight"], self.spec.rms_norm_eps)
                add_shared_(rows, hidden, weights)
                del hidden

    def _shared_backward(self, index: int, grad: Tensor, x: Tensor, weights: Weights, grads: Weights) -> None:
        if not self.spec.shared_expert_intermediate_size:
            return
        tokens = slice_rows(self._rows(x, index), self.shared_tokens)
        with component("shared_experts"):
            for rows, target in zip(
                tokens, slice_rows(self._rows(grad, index), self.shared_tokens), strict=True
            ):
                hidden = rms_norm(rows, weights["ffn_norm.weight"], self.spec.rms_norm_eps)
                grad_hidden = shared_backward(target, hidden, weights, grads)
                del hidden
                self._norm_backward(target, rows, grad_hidden, weights, grads)
                del grad_hidden

    def _norm_backward(
        self, target: Tensor, x: Tensor, grad: Tensor, weights: Weights, grads: Weights
    ) -> None:
        rms_norm_backward_(
            target, x, grad, weights["ffn_norm.weight"], grads["ffn_norm.weight"], self.spec.rms_norm_eps
        )


@dataclass
class _Expert:
    """Parameters of one expert, or their gradients; biases are None where the network has none."""

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None


def _each(held: Sequence[Weights]) -> list[_Expert]:
    return [expert for experts in held for expert in _unstacked(experts)]


def _unstacked(experts: Weights) -> list[_Expert]:
    stacks = [experts[f"moe.experts.{name}_proj"].unbind(0) for name in ("gate", "up", "down")]
    biases = [experts.get(f"moe.experts.{name}_proj_bias") for name in ("gate", "up", "down")]
    none = (None,) * len(stacks[0])
    return [
        _Expert(*parts)
        for parts in zip(*stacks, *(none if one is None else one.unbind(0) for one in biases), strict=True)
    ]


def experts_forward_(
    rows: Tensor, route_weights: Tensor, counts: list[int], held: Sequence[Weights],
    clamp: Clamp | None = None,
) -> None:  # fmt: skip
    """Rows [R, H] sorted by expert become weight * expert(row), in place. counts: of the experts of all
    stacks in `held`; more are 0. Temporaries: 2 I rows of one expert.
    """
    start = 0
    for count, expert in zip(counts, _each(held), strict=False):
        if count:
            part = rows[start : start + count]
            weight = route_weights[start : start + count, None]
            gate, up = (
                _product(part, expert.gate, expert.gate_bias),
                _product(part, expert.up, expert.up_bias),
            )
            inner = swiglu_activation(gate, up) if clamp is None else clamped_activation(gate, up, clamp)
            del gate, up
            torch.mm(inner.mul_(weight), expert.down, out=part)
            if expert.down_bias is not None:
                part.addcmul_(weight.to(part.dtype), expert.down_bias)
            del inner
        start += count


def experts_backward_(
    rows: Tensor, inputs: Tensor, route_weights: Tensor, counts: list[int], held: Sequence[Weights],
    grads: Sequence[Weights], clamp: Clamp | None = None,
) -> Tensor:  # fmt: skip
    """Rows [R, H], gradients of weight * expert(input), become gradients of the inputs in place; grads += the
    weights'.

    Returns the gradients of the route weights [R] in the wide dtype. Temporaries: 5 I rows of one expert.
    """
    grad_weights = torch.empty(rows.shape[0], dtype=wide(rows.dtype), device=rows.device)
    start = 0
    for count, expert, own in zip(counts, _each(held), _each(grads), strict=False):
        if count:
            stop = start + count
            _one_expert_backward(
                rows[start:stop], inputs[start:stop], route_weights[start:stop, None],
                grad_weights[start:stop], expert, own, clamp,
            )  # fmt: skip
        start += count
    return grad_weights


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


def _one_expert_backward(
    rows: Tensor, inputs: Tensor, route_weights: Tensor, grad_weights: Tensor, expert: _Expert, own: _Expert,
    clamp: Clamp | None,
) -> None:  # fmt: skip
    """`experts_backward_` for the rows of one expert."""
    gate, up = _product(inputs, expert.gate, expert.gate_bias), _product(inputs, expert.up, expert.up_bias)
    if clamp is None:
        silu = F.silu(gate)
        inner = silu * up
    else:
        inner = clamped_activation(gate, up, clamp)
    grad_inner = rows @ expert.down.t()
    grad_weights.copy_((inner * grad_inner).sum(-1, dtype=grad_weights.dtype))
    add_matmul(own.down, inner.mul_(route_weights).t(), rows)
    del inner
    if expert.down_bias is not None and own.down_bias is not None:
        grad_weights.add_((rows * expert.down_bias).sum(-1, dtype=grad_weights.dtype))
        own.down_bias.add_((rows * route_weights).sum(0))
    grad_inner.mul_(route_weights)
    if clamp is None:
        grad_gate, grad_up = swiglu_activation_backward(grad_inner, gate, up, silu)
    else:
        grad_gate, grad_up = clamped_activation_backward(grad_inner, gate, up, clamp)
    add_matmul(own.gate, inputs.t(), grad_gate)
    add_matmul(own.up, inputs.t(), grad_up)
    for bias, grad in ((own.gate_bias, grad_gate), (own.up_bias, grad_up)):
        if bias is not None:
            bias.add_(grad.sum(0))
    torch.mm(grad_gate, expert.gate.t(), out=rows)
    rows.addmm_(grad_up, expert.up.t())
