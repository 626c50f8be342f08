"""One decoder layer, forward and backward, without and with recomputation."""

from mopsim.layers.attention import attention, norm
from mopsim.layers.experts import router
from mopsim.layers.ffn import ffn
from mopsim.layers.tape import Played, Tape, Value
from mopsim.lowering.builder import Builder
from mopsim.lowering.context import Context
from mopsim.lowering.tapes.moe import Experts
from mopsim.lowering.workload import Work
from mopsim.spec.layout import token_slices


class Blocks:
    """Lowers layers of one program. Equal layers share their tapes."""

    def __init__(self, context: Context, builder: Builder) -> None:
        self.context, self.builder = context, builder
        self.experts = Experts(context, builder) if context.model.num_local_experts else None
        self._cache: dict[tuple[object, ...], list[Played]] = {}
        self._tapes: dict[tuple[object, ...], Tape] = {}

    def is_moe(self, layer: int) -> bool:
        model = self.context.model
        return model.is_moe_layer(layer) if layer < model.num_hidden_layers else bool(model.num_local_experts)

    def _attention(self, layer: int) -> Tape:
        key = ("attention", self.context.model.window(layer))
        if key not in self._tapes:
            self._tapes[key] = attention(self.context.model, self.context.shapes, layer)
        return self._tapes[key]

    def _norm(self, moe: bool) -> Tape:
        key = ("norm", moe)
        if key not in self._tapes:
            c = self.context
            kernel = norm(
                "ffn_norm", "y", "h", c.tokens, c.model.hidden_size, c.b, "router" if moe else "dense_ffn"
            )
            self._tapes[key] = Tape((Value("y", c.hidden),), (kernel,), ("h",))
        return self._tapes[key]

    def _router(self) -> Tape:
        if ("router",) not in self._tapes:
            c = self.context
            self._tapes["router",] = router(c.model, c.tokens, c.b, c.wide)
        return self._tapes["router",]

    def _slice(self, tokens: int, moe: bool) -> Tape:
        key = ("slice", tokens, moe)
        if key not in self._tapes:
            c = self.context
            width = c.model.shared_expert_intermediate_size if moe else c.model.intermediate_size
            tape = ffn(c.model, tokens, width, c.b, "shared_experts" if moe else "dense_ffn")
            self._tapes[key] = Tape(tape.inputs, tape.kernels, tape.outputs)
        return self._tapes[key]

    def played(self, tape: Tape, mode: str) -> list[Played]:
        key = (id(tape), mode)
        if key not in self._cache:
            self._cache[key] = tape.backward() if mode == "backward" else tape.forward(mode == "graph")
        return self._cache[key]

    def _slices(self, moe: bool) -> list[tuple[int, int]]:
        model = self.context.model
        if moe and not model.shared_expert_intermediate_size:
            return []
        return token_slices(self.context.tokens, self.context.strategy.dense.chunk_tokens)

    def forward(self, layer: int, deps: list[int], moe_deps: list[int]) -> int:
        """x -> next x (category boundaries), no graph. deps: dense parameters there; moe_deps: experts'
        there."""
        c, b = self.context, self.builder
        moe = self.is_moe(layer)
        part = "experts" if moe else "dense_ffn"
        last = b.run(self.played(self._attention(layer), "plain"), "forward", layer, deps)
        last = b.run(self.played(self._norm(moe), "plain"), "forward", layer, [last])
        b.adopt("y", c.hidden)
        b.adopt("h", c.hidden)
        b.make("out", c.hidden)
        if moe:
            assert self.experts is not None
            last = b.run(self.played(self._router(), "plain"), "forward", layer, [last])
            self._adopt_routes()
            last = self.experts.forward(layer, "forward", [last, *moe_deps])
            b.drop("choice", "weight")
        for start, stop in self._slices(moe):
            tape = self._slice(stop - start, moe)
            last = b.run(self.played(tape, "plain"), "forward", layer, [last])
            b.adopt("f", tape.values["f"].bytes)
            work = (Work("memory_bound", bytes=3.0 * tape.values["f"].bytes),)
            last = b.add("slice added", "compute", part, "forward", work, layer=layer, deps=[last])
            b.drop("f")
        b.make(f"x{layer + 1}", c.hidden, "boundaries")
        last = b.add(
            "residual",
            "compute",
            part,
            "forward",
            (Work("memory_bound", bytes=3.0 * c.hidden),),
            layer=layer,
            deps=[last],
        )
        b.drop("out", "y", "h")
        b.flush(part, "forward", layer)
        return last

    def _adopt_routes(self) -> None:
        values = self._router().values
        self.builder.adopt("choice", values["choice"].bytes)
        self.builder.adopt("weight", values["weight"].bytes)

    def backward(self, layer: int, deps: list[int], moe_deps: list[int]) -> int:
        """From the output's gradient (`dx`) to the input's, the layer recomputed from its input; that
        boundary is freed."""
        c, b = self.context, self.builder
        moe = self.is_moe(layer)
        part = "experts" if moe else "dense_ffn"
        attend, pre = self._attention(layer), self._norm(moe)
        # torch's reentrant checkpoint holds what it recomputed while the backward of the layer runs
        held = c.hidden if c.runs_autograd else 0
        b.make("recomputed", held)
        last = b.run(self.played(attend, "graph"), "recompute", layer, deps)
        last = b.run(self.played(pre, "graph"), "recompute", layer, [last])
        b.adopt("y", c.hidden)
        b.adopt("h", c.hidden)
        if moe:
            assert self.experts is not None
            last = b.run(self.played(self._router(), "graph"), "recompute", layer, [last])
            self._adopt_routes()
            b.make("dh", c.hidden)
            last = self.experts.backward(layer, [last, *moe_deps])
        else:
            b.make("dh", c.hidden)
        for start, stop in self._slices(moe):
            tape = self._slice(stop - start, moe)
            last = b.run(self.played(tape, "graph"), "recompute", layer, [last])
            last = b.run(self.played(tape, "backward"), "backward", layer, [last])
            b.adopt("dslice", tape.inputs[0].bytes)
            b.drop("dslice")
            b.flush(part, "backward", layer)
        if moe:
            del b.alive["weight"]  # its gradient takes its place, and dies in the router's backward
            last = b.run(self.played(self._router(), "backward"), "backward", layer, [last])
            b.adopt("dh_router", c.hidden)
            b.drop("dh_router", "choice")
        b.drop("dh", "h")
        b.make("dh2", c.hidden)
        last = b.run(self.played(pre, "backward"), "backward", layer, [last])
        del b.alive["dh2"]
        b.adopt("dy", c.hidden)
        b.drop("y")
        last = b.run(self.played(attend, "backward"), "backward", layer, [last])
        del b.alive["dy"]
        b.drop("dx", f"x{layer}", "recomputed")
        b.adopt("dx", c.hidden)
        b.flush("attention", "backward", layer)
        return last
