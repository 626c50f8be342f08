"""One step under FSDP2: microbatches (forward, loss, backward), then clip and torch's fused AdamW."""

from mopsim.lowering.builder import Builder
from mopsim.lowering.context import Context
from mopsim.lowering.fsdp import loss
from mopsim.lowering.fsdp.copies import update_host
from mopsim.lowering.fsdp.layer import FsdpLayer
from mopsim.lowering.fsdp.units import FsdpUnits
from mopsim.lowering.resident import resident
from mopsim.lowering.units import Unit
from mopsim.lowering.workload import Program, Work
from mopsim.spec.layout import token_slices

_C, _L = "vocabulary", "logits"


class FsdpStep:
    """Lowers the program of a rank (mopexec.modules.fully_shard)."""

    def __init__(self, context: Context) -> None:
        self.c = context
        self.b = Builder(context.groups, context.strategy.precision.compute)
        self.units = FsdpUnits(context, self.b)
        self.layer = FsdpLayer(context, self.b, self.units)
        self.recompute = context.strategy.activations.recompute == "full"
        self.edge = _joined(context)

    def program(self, microbatches: int) -> Program:
        """A step of `microbatches` microbatches."""
        for index in range(microbatches):
            self.b.mark(index)
            self._forward()
            self._backward()
        self.b.mark(-1)
        self._update()
        self.units.forget_gradients()
        self.b.flush("optimizer", "optimizer")
        return self.b.program(0, self.c.strategy.stage_ranks, resident(self.c))

    def _forward(self) -> None:
        c, b, units = self.c, self.b, self.units
        embedding, count = c.edges["embedding"], c.model.num_hidden_layers
        units.wait(embedding, "forward")
        self._ahead(-1, "forward")
        b.make("x", c.hidden)
        work = [Work("memory_bound", bytes=2.0 * c.hidden)]
        b.compute("embedding", "embedding", "forward", -1, work)
        if c.reshards:
            units.release(embedding)
        for layer in range(count):
            units.wait(c.layers[layer][0], "forward")
            self._ahead(layer, "forward")
            b.rename("x", f"x.{layer}", "boundaries" if self.recompute else "")
            self.layer.forward(layer, "forward", graph=not self.recompute)
            b.rename("out", "x")
            if c.reshards:
                units.release(c.layers[layer][0])
            if self.recompute and layer < c.offloaded:
                self._offload(layer)
            if not self.recompute and self.layer.cast:
                b.drop(f"x.{layer}")
        units.wait(self.edge, "forward")
        self._loss()

    def _offload(self, layer: int) -> None:
        """A checkpointed input goes to the host while the layer runs."""
        c, b = self.c, self.b
        work = (Work("d2h", bytes=float(c.hidden)),)
        b.add(f"boundary {layer} down", "d2h", "other", "forward", work, layer=layer, deps=(b.last,))
        b.drop(f"x.{layer}")

    def _ahead(self, layer: int, phase: str) -> None:
        """Explicit prefetch of the units of the next layers (in backward: the previous ones)."""
        c, depth = self.c, self.c.strategy.dense.prefetch
        step = 1 if phase == "forward" else -1
        for place in range(1, depth + 1):
            target = layer + step * place
            if 0 <= target < c.model.num_hidden_layers:
                for unit in c.layers[target][::step]:
                    self.units.gather(unit, phase)
            elif target == c.model.num_hidden_layers and phase == "forward":
                self.units.gather(self.edge, phase)

    def _backward(self) -> None:
        c, b, units = self.c, self.b, self.units
        self.units.reduce(self.edge)
        for layer in reversed(range(c.model.num_hidden_layers)):
            units.wait(c.layers[layer][0], "backward")
            if len(c.layers[layer]) > 1:
                units.gather(c.layers[layer][1], "backward")
            self._ahead(layer, "backward")
            if self.recompute:
                self._restore(layer)
                self.layer.forward(layer, "recompute", graph=True)
            elif len(c.layers[layer]) > 1:
                units.wait(c.layers[layer][1], "backward")
            self.layer.backward(layer)
            if f"x.{layer}" in b.alive:
                b.drop(f"x.{layer}")
        embedding = c.edges["embedding"]
        b.make(f"grads {embedding.name}", embedding.numel * c.b, "gathered_grads")
        b.compute("embedding", "embedding", "backward", -1, [Work("memory_bound", bytes=3.0 * c.hidden)])
        b.drop("dx")
        units.reduce(embedding)
        units.finish()

    def _restore(self, layer: int) -> None:
        c, b = self.c, self.b
        if layer < c.offloaded:
            b.make(f"x.{layer}", c.hidden, "boundaries")
            work = (Work("h2d", bytes=float(c.hidden)),)
            op = b.add(f"boundary {layer} up", "h2d", "other", "backward", work, layer=layer, deps=(b.last,))
            b.compute("restored", "other", "backward", layer, [], op)

    def _loss(self) -> None:
        """Final norm, logits, cross entropy and their backward: leaves `dx`."""
        c, b, layer = self.c, self.b, self.layer
        count = c.model.num_hidden_layers
        layer._norm_forward(count, "norm", layer.u, layer.w, "hidden", "forward", True, _C)
        if layer.cast:
            b.drop("x")
        if c.strategy.vocabulary.loss == "chunked":
            self._chunked()
        else:
            self._full()
        b.drop("hidden", "dhidden")
        layer._norm_backward(count, "norm", layer.u, layer.w, _C)
        b.make("dx", c.hidden)
        if not layer.cast:
            b.drop("x")
        b.flush(_C, "backward")

    def _full(self) -> None:
        c, b = self.c, self.b
        n, V = c.tokens, c.model.vocab_size
        if c.b != c.wide:
            b.make("logits", n * V * c.b, _L)
        b.make("exact", n * V * c.wide, _L)
        b.make("logp", n * V * c.wide, _L)
        works = [
            loss.product(c, n, V),
            Work("memory_bound", bytes=float(n * V * (c.b + 4 * c.wide)), launches=4),
        ]
        b.compute("logits", _C, "forward", -1, works)
        b.drop("exact", *(["logits"] if c.b != c.wide else []))
        self._ahead(c.model.num_hidden_layers, "backward")
        b.make("dlogp", n * V * c.wide, _L)
        b.make("dexact", n * V * c.wide, _L)
        b.compute(
            "cross_entropy",
            _C,
            "backward",
            -1,
            [Work("memory_bound", bytes=6.0 * n * V * c.wide, launches=3)],
        )
        b.drop("dlogp", "logp")
        if c.b != c.wide:
            b.make("dlogits", n * V * c.b, _L)
            b.drop("dexact")
        b.make(f"grads {self.edge.name}", self.edge.numel * c.b, "gathered_grads")
        b.make("dhidden", c.hidden)
        b.compute("logits", _C, "backward", -1, loss.back(c, n, V))
        b.drop("dlogits" if c.b != c.wide else "dexact")

    def _chunked(self) -> None:
        c, b, V = self.c, self.b, self.c.model.vocab_size
        b.make(f"grads {self.edge.name}", self.edge.numel * c.b, "gathered_grads")
        b.make("dhidden", c.hidden)
        gradient = float(self.edge.numel * c.b)
        b.compute("weight gradient", _C, "forward", -1, [loss.once(gradient)])
        for start, stop in token_slices(c.tokens, c.strategy.vocabulary.chunk_tokens):
            n = stop - start
            b.make("exact", n * V * c.wide, _L)
            if c.b != c.wide:
                b.spike(n * V * c.b, _L)
            b.drop("exact")
            b.compute("chunk", _C, "forward", -1, loss.chunk(c, n, V, gradient))

    def _update(self) -> None:
        """Norm over all shards, clip in place, fused AdamW where the state is."""
        c, b = self.c, self.b
        total = sum(unit.shard_numel for unit in c.units())
        self._agree()
        count = 12 * c.model.num_hidden_layers
        _O = "optimizer"
        if c.strategy.optimizer.state_tier == "host":
            work = (Work("host_optimizer", params=total, launches=count),)
            norm = b.add("norm", "host", _O, _O, (), deps=(b.last,))
            b.issue("norm", "all_reduce", 8, "world", _O, _O)
            done = b.add("host adamw", "host", _O, _O, work, deps=(norm,))
            b.compute("updated", _O, _O, -1, [], done)
            return
        b.compute("norm", _O, _O, -1, [Work("memory_bound", bytes=float(total * c.grad), launches=count)])
        agreed = b.issue("norm", "all_reduce", 8, "world", _O, _O)
        works = [
            Work("memory_bound", bytes=2.0 * total * c.grad, launches=count),
            Work("optimizer", params=total, launches=count, host=update_host(c, c.units(), 3 * count)),
        ]
        b.compute("adamw", _O, _O, -1, works, agreed)

    def _agree(self) -> None:
        """What all ranks sum beside gradients: the loss, and every router's load for its balance bias."""
        c, b = self.c, self.b
        loads = [8.0] + [4.0 * c.model.num_local_experts] * c.model.num_moe_layers
        ops = [b.issue("agree", "all_reduce", size, "world", "optimizer", "optimizer") for size in loads]
        b.compute("agreed", "optimizer", "optimizer", -1, [], *ops)


def _joined(context: Context) -> Unit:
    """Final norm and head are one group."""
    final, head = context.edges["final"], context.edges["head"]
    return Unit(
        "head",
        _C,
        -1,
        final.numel + head.numel,
        head.shard,
        head.copies,
        head.group,
        head.replicas,
        head.largest,
    )
