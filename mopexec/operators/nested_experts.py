"""Experts under nested checkpoints (arXiv 2609.14306): one of the whole layer, and in it one of each chunk's
products.

The layer's recomputation runs its experts as the forward does, in chunks, and keeps the packed rows of each
chunk, in the experts' order. A chunk's backward is sent output gradients alone, runs the products of its rows
a third time and frees what they leave before the next chunk's. As under a checkpoint, nobody reads what the
recomputation sums, nor the third output: `experts` leaves both out, and sends rows again instead.
"""

from torch import Tensor

from mopexec.measure.tracker import category, component, phase
from mopexec.operators.dispatch import ChunkExchange
from mopexec.operators.experts import Chunk, MoEBlock, Pass, Returned, Weights
from mopexec.operators.least_loaded import Foreign
from mopexec.operators.routes import Routes


class NestedMoEBlock(MoEBlock):
    """As MoEBlock, to the bit, with more products and exchanges."""

    nested = True

    def begin(
        self, x: Tensor, routes: Routes, weights: Weights, experts: Weights, foreign: Foreign | None
    ) -> Pass:
        with phase("recompute"):
            now = self._again(x, routes, weights, experts, foreign)

            def products(index: int, exchange: ChunkExchange, rows: list[Tensor]) -> None:
                now.kept.append(rows[0])
                self._products(now, index, exchange, rows)

            def combine(returned: Returned) -> None:
                with component("experts"), category("dispatch"):
                    nowhere = x.new_zeros(self._rows(x, returned.index).shape)
                self._combine(returned, nowhere)

            self._pipeline(
                lambda index: None,
                lambda index: self._dispatch(index, now, x, weights, None),
                products,
                combine,
            )
        return now

    def _dispatch_grads(self, index: int, begun: Pass, x: Tensor, weights: Weights, grad: Tensor) -> Chunk:
        exchange, top_k = begun.exchanges[index], self.spec.num_experts_per_tok
        with component("experts"), category("dispatch"):
            rows = [self._rows(grad, index).index_select(0, exchange.order // top_k)]
            return Chunk(exchange, [exchange.start(rows.pop())])

    def _products_backward(
        self, begun: Pass, index: int, exchange: ChunkExchange, rows: list[Tensor], grads: list[Weights]
    ) -> Tensor:
        rows.insert(0, begun.kept.pop(0))
        return super()._products_backward(begun, index, exchange, rows, grads)
