"""The MoE half of a layer: strided chunks through a pipeline dispatch(i+1) | experts(i) | combine(i-1), and
its backward.

x2 = x1 + sum over routes of weight * expert(norm(x1)) + shared experts(norm(x1)). The weight travels with the
token and is applied at the expert, so combining is a sum; or it is applied before (`weighted_inputs`). The
backward sends inputs and output gradients again, chunk by chunk, and recomputes gate and up only: the output
of an expert is not needed, since <dy, a W> = <dy W^T, a>. `nested_experts` has another backward.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mopexec.measure.tracker import category, component, phase
from mopexec.operators import expert_products, kernels
from mopexec.operators.activation import activation_of
from mopexec.operators.dispatch import Arrival, ChunkExchange, sum_routes
from mopexec.operators.ffn import add_shared_, shared_backward, slice_rows
from mopexec.operators.fused import OPS, split_packed
from mopexec.operators.least_loaded import Foreign
from mopexec.operators.looped_products import experts_backward_, experts_forward_
from mopexec.operators.norms import LayerNorms
from mopexec.operators.routes import RoutePlanner, Routes
from mopexec.operators.rows import row_slices
from mopexec.operators.ungated import ungated_of
from mopexec.operators.weighted_inputs import spread_backward
from mopsim.spec.layout import FUSED_ROWS
from mopsim.spec.model import ModelSpec

Weights = dict[str, Tensor]


@dataclass
class Chunk:
    """A chunk on its way to the experts: packed rows, and in the backward output gradients."""

    exchange: ChunkExchange
    rows: list[Arrival]


@dataclass
class Returned:
    """A chunk's results on their way home: token rows, and in the backward the gradients of the route
    weights.
    """

    index: int
    exchange: ChunkExchange
    rows: Arrival


@dataclass
class Pass:
    """One pass of a layer's experts: their weights, foreign those of others that rows here need; weights of
    the routes [N, top_k]; the chunks' exchanges. kept: packed rows of chunks, where the backward has them.
    """

    routes: Routes
    experts: Weights
    foreign: Foreign | None
    route_weights: Tensor
    exchanges: list[ChunkExchange]
    kept: list[Tensor] = field(default_factory=list)

    @property
    def held(self) -> list[Weights]:
        """All weights, those of others there by now."""
        return [self.experts, *(self.foreign.weights() if self.foreign else ())]


class MoEBlock:
    """Experts of every MoE layer for one microbatch shape. shared_tokens: tokens per slice of the shared
    experts.
    """

    nested = False
    """Whether the layer's recomputation runs the experts too (see `begin`), and each chunk's backward all of
    their products."""

    def __init__(self, spec: ModelSpec, planner: RoutePlanner, shared_tokens: int) -> None:
        self.spec, self.planner, self.shared_tokens = spec, planner, shared_tokens
        self.norms = LayerNorms.of(spec)
        self.num_chunks, self.how, self.ungated = planner.num_chunks, activation_of(spec), ungated_of(spec)

    def forward_(
        self, x: Tensor, routes: Routes, route_weights: Tensor, weights: Weights, experts: Weights,
        foreign: Foreign | None = None,
    ) -> None:  # fmt: skip
        """x1 [N, H] becomes x2 in place; route_weights [N, top_k]; weights of the layer's dense unit, experts
        of its expert unit, foreign those of others that rows here need.
        """
        now = Pass(routes, experts, foreign, route_weights, self._exchanges(routes))

        def combine(returned: Returned) -> None:
            self._combine(returned, self._rows(x, returned.index))

        self._pipeline(
            lambda index: self._add_shared(index, x, weights),
            lambda index: self._dispatch(index, now, x, weights, None),
            lambda index, exchange, rows: self._products(now, index, exchange, rows),
            combine,
        )

    def begin(
        self, x: Tensor, routes: Routes, weights: Weights, experts: Weights, foreign: Foreign | None
    ) -> Pass:
        """What the backward starts from, as `forward_`; x is x1."""
        with phase("backward"):
            return self._again(x, routes, weights, experts, foreign)

    def backward(
        self, grad: Tensor, x: Tensor, begun: Pass, weights: Weights, grads: Weights, expert_grads: Weights
    ) -> None:
        """grad [N, H] of x2 becomes that of x1 in place; x is x1; grads and expert_grads += the weights'.
        Takes `begun` apart."""
        held_grads = [expert_grads]
        with phase("backward"):
            with category("dispatch"):
                grad_weights = torch.empty_like(begun.route_weights)

            def before(index: int) -> None:
                if index == 0 and begun.foreign is not None:
                    held_grads.extend(begun.foreign.open_grads())
                self._shared_backward(index, grad, x, weights, grads)

            self._pipeline(
                before,
                lambda index: self._dispatch_grads(index, begun, x, weights, grad),
                lambda index, exchange, rows: self._products_backward(
                    begun, index, exchange, rows, held_grads
                ),
                lambda returned: self._combine_backward(
                    returned, grad, grad_weights, begun.route_weights, x, weights, grads
                ),
            )
            begun.exchanges.clear()
            del begun.route_weights
            self.planner.backward_(grad, grad_weights, x, begun.routes.experts, weights, grads)

    def _again(
        self, x: Tensor, routes: Routes, weights: Weights, experts: Weights, foreign: Foreign | None
    ) -> Pass:
        """A pass over tokens whose experts were chosen before."""
        route_weights = self.planner.weights(x, routes.experts, weights)
        return Pass(routes, experts, foreign, route_weights, self._exchanges(routes))

    def _pipeline(
        self, before: Callable[[int], None], dispatch: Callable[[int], Chunk],
        products: Callable[[int, ChunkExchange, list[Tensor]], Tensor | None],
        combine: Callable[[Returned], None],
    ) -> None:  # fmt: skip
        """dispatch(i+1) | products(i) | combine(i-1). before: what runs while chunk i is on its way; products
        leave of a chunk's rows those that go home, and return the gradients of their weights in a backward.
        """
        coming, returning = [dispatch(0)], list[Returned]()
        for index in range(self.num_chunks):
            before(index)
            exchange, rows = self._receive(coming.pop())
            if index + 1 < self.num_chunks:
                coming.append(dispatch(index + 1))
            with component("experts"):
                of_rows = products(index, exchange, rows)
            if returning:
                combine(returning.pop())
            returning.append(self._send_back(index, exchange, rows, of_rows))
            del exchange, rows, of_rows
        combine(returning.pop())

    def _products(self, now: Pass, index: int, exchange: ChunkExchange, rows: list[Tensor]) -> None:
        """A chunk's only rows, packed, become weight * expert(row); in place but where they are kept."""
        if now.foreign is None and expert_products.fits(rows[0], now.experts):
            expert_products.forward(rows, now.routes.ends[index], now.experts, self.how)
            return
        inputs, of_rows = split_packed(rows.pop(), self.spec.hidden_size)
        rows.append(inputs.new_empty(inputs.shape) if now.kept else inputs)
        experts_forward_(rows[0], inputs, of_rows, exchange.counts, now.held, self.how)

    def _products_backward(
        self, begun: Pass, index: int, exchange: ChunkExchange, rows: list[Tensor], grads: list[Weights]
    ) -> Tensor:
        """A chunk's rows, packed inputs and output gradients, become the gradients of the inputs alone;
        grads += the weights'. Returns those of the route weights [R].
        """
        experts, whole = begun.experts, self.nested
        if begun.foreign is None and expert_products.fits(rows[0], experts):
            ends = begun.routes.ends[index]
            return expert_products.backward(rows, ends, experts, grads[0], self.how, whole=whole)
        inputs, of_rows = split_packed(rows.pop(0), self.spec.hidden_size)
        held, counts = begun.held, exchange.counts
        return experts_backward_(rows[0], inputs, of_rows, counts, held, grads, self.how, whole=whole)

    def _exchanges(self, routes: Routes) -> list[ChunkExchange]:
        with component("router"), category("dispatch"):
            return ChunkExchange.of(self.planner.group, routes)

    def _rows(self, x: Tensor, index: int) -> Tensor:
        """The tokens of strided chunk `index`: a view [c, H]."""
        return x[index :: self.num_chunks]

    def _dispatch_grads(self, index: int, begun: Pass, x: Tensor, weights: Weights, grad: Tensor) -> Chunk:
        """Send what a chunk's backward wants: its tokens again, and output gradients."""
        return self._dispatch(index, begun, x, weights, grad)

    def _dispatch(self, index: int, now: Pass, x: Tensor, weights: Weights, grad: Tensor | None) -> Chunk:
        """Send a chunk's tokens and route weights (and, in the backward, output gradients) to the experts."""
        exchange, tokens = now.exchanges[index], self._rows(x, index)
        eps = self.spec.rms_norm_eps
        given = None if grad is None else self._rows(grad, index)
        own = self._rows(now.route_weights, index)
        how = exchange.order, self.spec.num_experts_per_tok, self.spec.expert_inputs_weighted
        if kernels.NOW.norm and not self.norms.centred:
            with component("experts"), category("dispatch"):
                scale = weights["ffn_norm.weight"]
                rows = OPS.pack_routes(tokens, scale, eps, given, own, *how)
                return Chunk(exchange, [exchange.start(rows.pop(0)) for _ in range(len(rows))])
        with component("router"):
            hidden = self.norms.forward(tokens, weights, "ffn_norm")
        with component("experts"), category("dispatch"):
            rows = OPS.pack_routes(hidden, None, eps, given, own, *how)
            del hidden
            return Chunk(exchange, [exchange.start(rows.pop(0)) for _ in range(len(rows))])

    def _receive(self, chunk: Chunk) -> tuple[ChunkExchange, list[Tensor]]:
        """A chunk's rows at the experts, in a list, to free them early; what was sent is freed."""
        with component("experts"), category("dispatch"):
            return chunk.exchange, [arrival.take() for arrival in chunk.rows]

    def _send_back(
        self, index: int, exchange: ChunkExchange, owned: list[Tensor], grad_weights: Tensor | None
    ) -> Returned:
        """Send a chunk's only remaining rows home; empties `owned`."""
        with component("experts"), category("dispatch"):
            return Returned(index, exchange, exchange.start_back(owned, grad_weights))

    def _combine(self, returned: Returned, target: Tensor) -> None:
        """target [c, H] += the sum of each token's routes, for the tokens of the chunk."""
        with component("experts"), category("dispatch"):
            rows, inverse = returned.rows.take(), returned.exchange.inverse
            if kernels.NOW.rows:
                OPS.add_routes_(target, rows, inverse, self.spec.num_experts_per_tok)
                return
            for start, stop in row_slices(target.shape[0]):
                target[start:stop].add_(self._sum_routes(rows, inverse, start, stop))

    def _combine_backward(
        self,
        returned: Returned,
        grad: Tensor,
        grad_weights: Tensor,
        route_weights: Tensor,
        x: Tensor,
        weights: Weights,
        grads: Weights,
    ) -> None:
        """Gradients of a chunk's tokens from their routes, through the norm, into grad; those of
        route_weights [N, top_k] into grad_weights.
        """
        top_k, inverse = self.spec.num_experts_per_tok, returned.exchange.inverse
        given = (x, grad, grad_weights, route_weights)
        tokens, target, own, share = (self._rows(one, returned.index) for one in given)
        inputs_weighted = self.spec.expert_inputs_weighted
        with component("experts"), category("dispatch"):
            rows, of_weights = returned.rows.take_weighted()
            if not kernels.NOW.rows and not inputs_weighted:
                own.copy_(of_weights.index_select(0, inverse).view(own.shape))
        for start, stop in row_slices(target.shape[0], FUSED_ROWS if kernels.NOW.rows else None):
            hidden = None
            if inputs_weighted:
                with component("router"):
                    hidden = self.norms.forward(tokens[start:stop], weights, "ffn_norm")
            with component("experts"), category("dispatch"):
                places = inverse[start * top_k : stop * top_k]
                if hidden is not None:
                    grad_hidden = _weighted_rows_backward(
                        own[start:stop], rows, hidden, share[start:stop], places
                    )
                    del hidden
                elif kernels.NOW.rows:
                    grad_hidden = OPS.take_routes_(own[start:stop], rows, of_weights, places, top_k)
                else:
                    grad_hidden = self._sum_routes(rows, inverse, start, stop)
            with component("router"):
                rows_of = target[start:stop], tokens[start:stop]
                self.norms.backward_(*rows_of, grad_hidden, weights, grads, "ffn_norm")

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
                hidden = self.norms.forward(rows, weights, "ffn_norm")
                add_shared_(rows, hidden, weights, self.ungated)
                del hidden

    def _shared_backward(self, index: int, grad: Tensor, x: Tensor, weights: Weights, grads: Weights) -> None:
        if not self.spec.shared_expert_intermediate_size:
            return
        tokens = slice_rows(self._rows(x, index), self.shared_tokens)
        with component("shared_experts"):
            for rows, target in zip(
                tokens, slice_rows(self._rows(grad, index), self.shared_tokens), strict=True
            ):
                hidden = self.norms.forward(rows, weights, "ffn_norm")
                grad_hidden = shared_backward(target, hidden, weights, grads, self.ungated)
                del hidden
                self.norms.backward_(target, rows, grad_hidden, weights, grads, "ffn_norm")
                del grad_hidden


def _weighted_rows_backward(
    grad_weights: Tensor, rows: Tensor, hidden: Tensor, weights: Tensor, places: Tensor
) -> Tensor:
    """See `weighted_inputs.take_weighted_`, in one kernel or composed."""
    top_k = weights.shape[1]
    if kernels.NOW.rows:
        grad_hidden: Tensor = OPS.take_weighted_(grad_weights, rows, hidden, weights, places, top_k)
        return grad_hidden
    each = rows.index_select(0, places).view(-1, top_k, rows.shape[1])
    grad_hidden, of_weights = spread_backward(each, hidden, weights)
    grad_weights.copy_(of_weights)
    return grad_hidden
