"""One decoder layer of the flat_units schedule: its units, its forward, and its recompute and backward."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from mopexec.flat.units import Unit, release
from mopexec.measure.tracker import phase
from mopexec.operators.attention import AttentionBlock
from mopexec.operators.experts import MoEBlock, Pass
from mopexec.operators.ffn import DenseBlock
from mopexec.operators.least_loaded import Foreign, Weights
from mopexec.operators.routes import Routes


class LayerSchedule:
    """A layer with its units. moe: None for a dense layer. Routes are kept from forward to backward."""

    def __init__(
        self,
        dense: Unit,
        experts: Unit | None,
        attention: AttentionBlock,
        ffn: DenseBlock,
        moe: MoEBlock | None,
    ) -> None:
        self.dense, self.experts, self.attention, self.ffn = dense, experts, attention, ffn
        self.moe = moe if experts is not None else None
        self.units = [dense] if experts is None else [dense, experts]
        self._routes: Routes | None = None

    def gather(self) -> None:
        """Start gathering the layer's parameters."""
        for unit in self.units:
            unit.gather()

    def forward(self, x: Tensor, balance_bias: Tensor, load: Tensor) -> Tensor:
        """x [N, H] to a new tensor; x is left as it was. balance_bias and load [E] of this layer's router."""
        weights = self.dense.weights()
        out = self.attention.forward(x, weights)
        if self.moe is None:
            self.ffn.forward_(out, weights)
        else:
            assert self.experts is not None
            self._routes, route_weights = self.moe.planner.plan(out, weights, balance_bias, load)
            foreign = self._foreign(self._routes)
            self.moe.forward_(out, self._routes, route_weights, weights, self.experts.weights(), foreign)
            del foreign, route_weights
        release(self.units)
        return out

    def _begin(self, x: Tensor, weights: Weights) -> Pass:
        """The backward of the experts, up to their first gradient; x is the sum after attention."""
        assert self.moe is not None
        assert self.experts is not None
        assert self._routes is not None
        routes, foreign = self._routes, self._foreign(self._routes)
        return self.moe.begin(x, routes, weights, self.experts.weights(), foreign)

    def _foreign(self, routes: Routes) -> Foreign | None:
        """Others' experts that rows here need, on their way."""
        if routes.moves is None:
            return None
        assert self.moe is not None
        assert self.experts is not None
        unit, contents = self.experts, self.experts.contents

        def views(rows: Tensor) -> Weights:
            return replace(contents, stack=rows.shape[0]).views(rows.flatten())

        own, group = contents.by_copy(unit.full), self.moe.planner.group
        return Foreign(own, contents.first, views, group, routes.moves, unit.reduce_dtype)

    def _begins(self, grad: Tensor, weights: Weights, grads: Weights) -> None:
        """The backward of what is before the layer in its unit; grad [N, H] is that of its input."""

    def forget(self) -> None:
        """Drop what the forward kept for a backward that will not come."""
        self._routes = None

    def backward(
        self, x: Tensor, grad: Tensor, before_grads: Callable[[], None], prefetch: Callable[[], None]
    ) -> None:
        """grad [N, H] of the layer's output becomes that of x in place; gradients of the units start on their
        way.

        before_grads is called between the recompute and the first gradient buffer, prefetch (of the next
        boundary) after attention's core, since memory peaks in the experts or there.
        """
        weights = self.dense.weights()
        inner, saved = self.attention.recompute(x, weights)
        kept = [saved]
        del saved
        begun = self._begin(inner, weights) if self.moe is not None and self.moe.nested else None
        before_grads()
        grads = self.dense.open_grads()
        if self.moe is None:
            self.ffn.backward(grad, inner, weights, grads)
        else:
            assert self.experts is not None
            expert_grads = self.experts.open_grads()
            begun = begun or self._begin(inner, weights)
            self.moe.backward(grad, inner, begun, weights, grads, expert_grads)
            if begun.foreign is not None:
                begun.foreign.send_home(self.experts.contents.by_copy(self.experts.full_grads))
            del begun
            self._routes = None
            del expert_grads
            self.experts.release()
            self.experts.reduce()
        del inner
        self.attention.backward(grad, x, kept, weights, grads, prefetch)
        self._begins(grad, weights, grads)
        del grads, weights
        with phase("backward"):
            self.dense.release()
            self.dense.reduce()
