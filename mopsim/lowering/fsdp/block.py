"""Norms and dense FFN under autograd, and the sizes that a layer's parts share.

u: bytes of [N, H] in the compute dtype, w: in the wide one. A checkpointed forward keeps nothing.
"""

from mopsim.layers.eager import NORM, NORM_BACKWARD, traffic
from mopsim.layers.experts import migration
from mopsim.layers.ffn import ffn
from mopsim.layers.tape import Kernel, Tape
from mopsim.lowering.builder import Builder
from mopsim.lowering.context import Context
from mopsim.lowering.fsdp.units import FsdpUnits
from mopsim.lowering.workload import Work


class FsdpBlock:
    """What the halves of a layer share; buffers that the graph keeps carry the layer's number."""

    def __init__(self, context: Context, builder: Builder, units: FsdpUnits) -> None:
        self.c, self.b, self.units = context, builder, units
        model = context.model
        self.N, self.H, self.D = context.tokens, model.hidden_size, context.shapes.sequence
        self.u, self.w = context.hidden, context.tokens * model.hidden_size * context.wide
        self.cast = context.b != context.wide
        self.q = self.N * model.num_attention_heads * model.head_dim * context.b
        self.kv = self.N * model.num_key_value_heads * model.head_dim * context.b
        spread = max(self.D, model.num_key_value_heads) // model.num_key_value_heads
        self.kv_whole = self.kv * spread
        self.lse = self.N * model.num_attention_heads * context.wide
        local_kv = model.num_key_value_heads * spread
        self.repeats = model.num_attention_heads // local_kv
        if model.num_local_experts:
            self.k = model.num_experts_per_tok
            self.routes = context.routes(0)
            self.sent = self.N * self.k
            self.split = context.strategy.experts.degree > 1
            self.arrived = sum(self.routes) if self.split else self.sent
            self.row = self.H * context.b
            self.wing = model.moe_intermediate_size * context.b
            moved = context.migration if self.split else None
            self.moving = migration(moved) if moved else None
        self._tapes: dict[str, dict[str, Kernel]] = {}

    def kernels(self, key: str, tape: Tape | None = None) -> dict[str, Kernel]:
        if key not in self._tapes:
            assert tape is not None
            self._tapes[key] = {kernel.name: kernel for kernel in tape.kernels}
        return self._tapes[key]

    def _keep(self, layer: int, graph: bool, name: str, kept: str, category: str = "") -> None:
        """A value of the forward: saved for the backward of the layer, or freed."""
        if graph:
            self.b.rename(name, f"{kept}.{layer}", category)
        else:
            self.b.drop(name)

    def _norm_forward(
        self, layer: int, name: str, u: int, w: int, out: str, phase: str, graph: bool, component: str
    ) -> None:
        """RMSNorm as torch composes it: the input in the wide dtype and the normed value are kept."""
        b = self.b
        if self.cast:
            b.make(f"{name}x", w)
        b.spike(w)
        b.make(f"{name}n", w)
        if self.cast:
            b.make("wide", w)
        b.make(out, u)
        work = [Work("memory_bound", bytes=traffic(NORM, u, w), launches=NORM.launches)]
        b.compute(name, component, phase, layer, work)
        if self.cast:
            b.drop("wide")
            self._keep(layer, graph, f"{name}x", f"{name}x")
        self._keep(layer, graph, f"{name}n", f"{name}n")

    def _norm_backward(self, layer: int, name: str, u: int, w: int, component: str) -> None:
        """The gradient of a norm's output (owned by the caller) becomes that of its input."""
        b = self.b
        b.spike((4.5 if self.cast else 3.5) * w)
        moved = traffic(NORM_BACKWARD, u, w)
        work = [Work("memory_bound", bytes=moved, launches=NORM_BACKWARD.launches)]
        b.compute(name, component, "backward", layer, work)
        b.drop(*([f"{name}x.{layer}"] if self.cast else []), f"{name}n.{layer}")

    def _ffn_kernels(self, width: int, component: str) -> dict[str, Kernel]:
        return self.kernels(component, ffn(self.c.model, self.N, width, self.c.b, component))

    def _ffn_forward(self, layer: int, phase: str, graph: bool, width: int, component: str) -> None:
        b, size = self.b, self.N * width * self.c.b
        kernels = self._ffn_kernels(width, component)
        for name in ("gate", "silu", "up", "act"):
            b.make(f"{component}_{name}", size)
        redo = phase == "recompute"
        if not redo:
            b.make("f", self.u)
        works = [
            w for name in kernels for w in b.works(kernels[name], False) if not (redo and name == "down_proj")
        ]
        b.compute("ffn", component, phase, layer, works)
        for name in ("gate", "silu", "up", "act"):
            self._keep(layer, graph, f"{component}_{name}", f"{component}_{name}")

    def _ffn_backward(self, layer: int, width: int, component: str) -> None:
        """Makes `dh` (the gradient of the normed input)."""
        b, size = self.b, self.N * width * self.c.b
        kernels = self._ffn_kernels(width, component)
        b.spike(size)
        b.drop(f"{component}_act.{layer}")
        b.spike(3 * size)
        b.make("dpair", 2 * size)
        b.drop(f"{component}_silu.{layer}", f"{component}_up.{layer}")
        b.make("dh", self.u)
        b.spike(2 * self.u)
        works = [work for name in kernels for work in b.works(kernels[name], True)]
        b.compute("ffn", component, "backward", layer, works)
        b.drop("dpair", f"{component}_gate.{layer}")
