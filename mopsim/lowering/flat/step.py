"""One step of the flat_units runtime: microbatches (forward, loss, backward), then the update."""

from mopsim.lowering.builder import Builder
from mopsim.lowering.context import Context
from mopsim.lowering.flat.attention import AttentionLowering
from mopsim.lowering.flat.experts import ExpertsLowering
from mopsim.lowering.flat.ffn import FfnLowering
from mopsim.lowering.flat.loss import LossLowering
from mopsim.lowering.flat.rows import Rows, slice_rows
from mopsim.lowering.flat.units import UnitLowering
from mopsim.lowering.flat.update import update
from mopsim.lowering.resident import resident
from mopsim.lowering.workload import Program, Work


class FlatStep:
    """Lowers the program of a rank (mopexec.flat.flat_units and .layer)."""

    def __init__(self, context: Context) -> None:
        self.c = context
        self.b = Builder(context.groups, context.strategy.precision.compute)
        self.rows = Rows(context, self.b)
        self.units = UnitLowering(context, self.b)
        self.attention = AttentionLowering(context, self.b)
        self.ffn = FfnLowering(context, self.b)
        self.experts = ExpertsLowering(context, self.b, self.ffn) if context.model.num_local_experts else None
        self.up: dict[int, int] = {}
        self.stored: int | None = None

    def program(self, microbatches: int) -> Program:
        """A step of `microbatches` microbatches."""
        for index in range(microbatches):
            self.b.mark(index)
            self._forward()
            self._loss()
            self._backward()
        self.b.mark(-1)
        update(self.c, self.b)
        self.b.flush("optimizer", "optimizer")
        return self.b.program(0, self.c.strategy.stage_ranks, resident(self.c))

    def _forward(self) -> None:
        c, b, units = self.c, self.b, self.units
        layers, ahead = c.model.num_hidden_layers, c.strategy.dense.prefetch
        embedding = c.edges["embedding"]
        ready = units.wait(embedding, "forward")
        b.make("x", c.hidden)
        b.compute(
            "embedding", "embedding", "forward", -1, [Work("memory_bound", bytes=2.0 * c.hidden)], ready
        )
        units.release(embedding)
        for layer in range(layers):
            for target in range(layer, min(layers, layer + 1 + ahead)):
                for unit in c.layers[target]:
                    units.gather(unit, "forward")
            self._put(layer)
            self._layer_forward(layer)
            if layer < c.offloaded:
                b.drop("x")
            b.rename("x1", "x")
        b.flush("vocabulary", "forward")

    def _put(self, layer: int) -> None:
        """Keep the layer's input, on the device or (the first ones) on the host."""
        c, b = self.c, self.b
        if layer >= c.offloaded:
            b.rename("x", f"x.{layer}", "boundaries")
            return
        b.rename("x", "boundary", "boundaries")
        b.rename("boundary", "x")
        deps = (b.last,)
        work = (Work("d2h", bytes=float(c.hidden)),)
        self.stored = b.add(f"boundary {layer} down", "d2h", "other", "forward", work, layer=layer, deps=deps)

    def _take(self, layer: int) -> int | None:
        """The layer's input back on the device; returns the copy to wait for."""
        if layer >= self.c.offloaded:
            return None
        self._prefetch(layer)
        return self.up.pop(layer)

    def _prefetch(self, layer: int) -> None:
        c, b = self.c, self.b
        if not 0 <= layer < c.offloaded or layer in self.up:
            return
        b.make(f"x.{layer}", c.hidden, "boundaries")
        work = (Work("h2d", bytes=float(c.hidden)),)
        deps = (b.last, self.stored)
        self.up[layer] = b.add(
            f"boundary {layer} up", "h2d", "other", "backward", work, layer=layer, deps=deps
        )

    def _layer_forward(self, layer: int) -> None:
        c, units = self.c, self.units
        self.attention.forward(layer, units.wait(c.layers[layer][0], "forward"))
        if c.model.is_moe_layer(layer):
            assert self.experts is not None
            self.experts.plan(layer)
            self.experts.forward(layer, units.wait(c.layers[layer][1], "forward"))
        else:
            self.ffn.forward(c.tokens, "dense_ffn", layer)
        units.release(*c.layers[layer])

    def _loss(self) -> None:
        c, b, units = self.c, self.b, self.units
        final, head = c.edges["final"], c.edges["head"]
        H = c.model.hidden_size
        units.gather(final, "forward")
        ready = (units.wait(final, "forward"), units.wait(head, "forward"))
        works = [self.rows.norm(c.tokens, H, "hidden"), units.open_grads(head)]
        b.compute("final_norm", "vocabulary", "forward", -1, works, *ready)
        loss = LossLowering(c, b)
        if c.strategy.vocabulary.loss == "ring":
            loss.ring()
        else:
            loss.local()
        b.drop("hidden")
        units.release(head)
        units.reduce(head)
        works = [units.open_grads(final), self.rows.norm_backward(c.tokens, H)]
        b.compute("final_norm", "vocabulary", "backward", -1, works)
        units.release(final)
        units.reduce(final)
        b.drop("x")

    def _backward(self) -> None:
        c, b, units = self.c, self.b, self.units
        ahead = c.strategy.dense.prefetch
        for layer in reversed(range(c.model.num_hidden_layers)):
            for target in range(layer, max(0, layer - ahead) - 1, -1):
                for unit in c.layers[target]:
                    units.gather(unit, "backward")
            self._layer_backward(layer, self._take(layer))
            b.drop(f"x.{layer}")
        self._embedding_backward()

    def _layer_backward(self, layer: int, there: int | None) -> None:
        c, b, units = self.c, self.b, self.units
        dense = c.layers[layer][0]
        self.attention.recompute(layer, units.wait(dense, "backward"), there)
        units.finish()
        works = [units.open_grads(dense)]
        if c.model.is_moe_layer(layer):
            assert self.experts is not None
            expert = c.layers[layer][1]
            works.append(units.open_grads(expert))
            ready = units.wait(expert, "backward")
            b.compute("zero gradients", "other", "backward", layer, works, ready)
            self.experts.backward(layer, ready)
            units.release(expert)
            units.reduce(expert)
        else:
            b.compute("zero gradients", "other", "backward", layer, works)
            self.ffn.backward(c.tokens, "dense_ffn", layer)
        b.drop("x1")
        self._prefetch(layer - 1)
        self.attention.backward(layer)
        units.release(dense)
        units.reduce(dense)

    def _embedding_backward(self) -> None:
        c, b, units = self.c, self.b, self.units
        units.finish()
        embedding = c.edges["embedding"]
        works = [units.open_grads(embedding), Work("memory_bound", bytes=3.0 * c.hidden)]
        if c.reduce != c.b:
            b.spike(slice_rows(c.tokens) * c.model.hidden_size * c.reduce)
        b.compute("embedding", "embedding", "backward", -1, works)
        units.reduce(embedding)
        units.finish()
        b.drop("grad")
        b.flush("embedding", "backward")
