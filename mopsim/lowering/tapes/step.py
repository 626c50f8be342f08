"""One step of a rank: microbatches (forward, loss, backward), then clip and optimizer."""

from mopsim.layers.layer import mtp_projection
from mopsim.layers.tape import Kernel
from mopsim.lowering.builder import Builder
from mopsim.lowering.context import Context
from mopsim.lowering.resident import resident
from mopsim.lowering.staged.works import works
from mopsim.lowering.tapes.blocks import Blocks
from mopsim.lowering.tapes.sharding import Sharding
from mopsim.lowering.tapes.update import update
from mopsim.lowering.tapes.vocabulary import loss
from mopsim.lowering.workload import Program, Work


class Step:
    """Lowers the program of one pipeline stage."""

    def __init__(self, context: Context) -> None:
        self.context = context
        precision = context.strategy.precision

        def products(kernel: Kernel, backward: bool) -> tuple[Work, ...]:
            return works(kernel, "backward" if backward else "forward", context)

        own = None if precision.matmul == "compute" else products
        self.builder = Builder(context.groups, precision.compute, own)
        self.sharding = Sharding(context, self.builder)
        self.blocks = Blocks(context, self.builder)
        self.reductions: list[int] = []
        self.projection = mtp_projection(context.model, context.shapes).kernels[1]

    def program(self, microbatches: int) -> Program:
        """A step of `microbatches` microbatches."""
        for index in range(microbatches):
            self.builder.mark(index)
            self._microbatch()
        update(self.context, self.builder, self.reductions)
        self.builder.flush("optimizer", "optimizer")
        return self.builder.program(0, self.context.strategy.stage_ranks, resident(self.context))

    def _microbatch(self) -> None:
        c, b = self.context, self.builder
        layers = c.model.num_hidden_layers + c.model.num_nextn_predict_layers
        last = self._embed()
        starts = {-1: last}
        issued = -1
        down: dict[int, int] = {}
        for layer in range(layers):
            issued = self._prefetch(issued, layer, range(layers), starts, "forward")
            if layer < c.offloaded:
                down[layer] = b.add(
                    f"boundary {layer} down",
                    "d2h",
                    "other",
                    "forward",
                    (Work("d2h", bytes=float(c.hidden)),),
                    layer=layer,
                    deps=[last],
                )
            if layer >= c.model.num_hidden_layers:
                last = self._project(layer, last)
            first = len(b.ops)
            last = self.blocks.forward(
                layer, [last, *self._ready(layer, "dense")], self._ready(layer, "experts")
            )
            starts[layer] = first
            for unit in c.layers[layer]:
                self.sharding.release(unit, "forward")
            if layer in down:
                b.drop(f"x{layer}")
                b.add("boundary freed", "compute", "other", "forward", layer=layer, deps=[down[layer]])
        last = loss(c, b, self.sharding, layers, [last])
        self._backward(layers, last)

    def _project(self, layer: int, last: int) -> int:
        """The input of an MTP layer: norms of the hidden state and of the next tokens' embeddings, and their
        projection (arXiv 2412.19437, 2.2). The hidden state stays, for its own loss."""
        c, b = self.context, self.builder
        b.rename(f"x{layer}", f"hidden{layer}")
        b.make(f"x{layer}", c.hidden, "boundaries")
        b.spike(2 * c.hidden)
        works = (Work("memory_bound", bytes=6.0 * c.hidden, launches=3), *b.works(self.projection, False))
        waits = [last, *self._ready(layer, "dense")]
        return b.add("projection", "compute", "vocabulary", "forward", works, layer=layer, deps=waits)

    def _predicted(self, layer: int, last: int) -> int:
        """Backward of an MTP layer's projection, and of the loss of the hidden state that it starts from."""
        c, b = self.context, self.builder
        b.rename(f"hidden{layer}", f"x{layer}")
        b.rename("dx", "dfurther")
        b.spike(4 * c.hidden)
        works = (
            *b.works(self.projection, True),
            Work("memory_bound", bytes=10.0 * c.hidden, launches=5),
        )
        last = b.add("projection", "compute", "vocabulary", "backward", works, layer=layer, deps=[last])
        last = loss(c, b, self.sharding, layer, [last])
        b.drop("dfurther")
        added = (Work("memory_bound", bytes=3.0 * c.hidden),)
        return b.add("gradients added", "compute", "vocabulary", "backward", added, deps=[last])

    def _backward(self, layers: int, last: int) -> None:
        c, b = self.context, self.builder
        order = list(reversed(range(layers)))
        starts, issued = {layers: last}, -1
        up: dict[int, int] = {}
        for place, layer in enumerate(order):
            issued = self._prefetch(
                issued,
                place,
                order,
                {i - 1: starts[order[i - 1] if i else layers] for i in range(place + 1)},
                "backward",
            )
            for ahead in (layer, layer - 1):
                if 0 <= ahead < c.offloaded and ahead not in up:
                    b.make(f"x{ahead}", c.hidden, "boundaries")
                    room = b.add("boundary room", "compute", "other", "backward", layer=ahead)
                    up[ahead] = b.add(
                        f"boundary {ahead} up",
                        "h2d",
                        "other",
                        "backward",
                        (Work("h2d", bytes=float(c.hidden)),),
                        layer=ahead,
                        deps=[room],
                    )
            for unit in c.layers[layer]:
                b.make(f"grads {unit.name}", unit.padded * c.grad, "gathered_grads")
            first = len(b.ops)
            waits = [last, *self._ready(layer, "dense"), *([up[layer]] if layer in up else [])]
            last = self.blocks.backward(layer, waits, self._ready(layer, "experts"))
            starts[layer] = first
            if layer >= c.model.num_hidden_layers:
                last = self._predicted(layer, last)
            for unit in c.layers[layer]:
                self.sharding.release(unit, "backward")
                self.reductions.append(self.sharding.reduce(unit, "backward", [last], f"grads {unit.name}"))
        unit = c.edges["embedding"]
        b.make("dembedding", unit.padded * c.grad, "gathered_grads")
        last = b.add(
            "embedding",
            "compute",
            "embedding",
            "backward",
            (Work("memory_bound", bytes=3.0 * c.hidden),),
            deps=[last],
        )
        b.drop("dx")
        b.flush("embedding", "backward")
        self.reductions.append(self.sharding.reduce(unit, "backward", [last], "dembedding"))

    def _embed(self) -> int:
        c, b = self.context, self.builder
        unit = c.edges["embedding"]
        gathered = self.sharding.gather(unit, "forward")
        b.make("x0", c.hidden, "boundaries")
        work = (Work("memory_bound", bytes=2.0 * c.hidden),)
        last = b.add("embedding", "compute", "embedding", "forward", work, deps=[gathered])
        self.sharding.release(unit, "forward")
        return last

    def _prefetch(
        self, issued: int, place: int, order: list[int] | range, starts: dict[int, int], phase: str
    ) -> int:
        """Gather the units of places up to `place` + prefetch; each may start when the place before its
        window has begun."""
        ahead = self.context.strategy.dense.prefetch
        for target in range(issued + 1, min(place + ahead, len(order) - 1) + 1):
            for unit in self.context.layers[order[target]]:
                self.sharding.gather(unit, phase, [starts.get(place - 1)])
            issued = target
        return issued

    def _ready(self, layer: int, kind: str) -> list[int]:
        """The gathers that a layer's dense or expert part waits for."""
        names = [
            unit.name
            for unit in self.context.layers[layer]
            if (unit.component == "experts") == (kind == "experts")
        ]
        return [self.sharding.gathered[name] for name in names if name in self.sharding.gathered]
