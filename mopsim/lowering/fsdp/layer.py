"""A decoder layer under autograd: forward without or with a graph, and its backward (mopexec.model.transformer).

Buffers are what Python frames and saved tensors hold. A checkpointed forward keeps nothing; its recompute keeps what the
backward needs. u: bytes of [N, H] in the compute dtype, w: in the wide one.
"""

from mopsim.layers.attention import attention
from mopsim.layers.experts import experts, router
from mopsim.layers.ffn import ffn
from mopsim.layers.tape import Kernel, Tape
from mopsim.lowering.builder import Builder
from mopsim.lowering.context import Context
from mopsim.lowering.fsdp.units import FsdpUnits
from mopsim.lowering.workload import Work

_A, _D = "attention", "dispatch"


class FsdpLayer:
    """Lowers one layer at a time; buffers that the graph keeps carry the layer's number."""

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
        self._tapes: dict[str, dict[str, Kernel]] = {}

    def kernels(self, key: str, tape: Tape | None = None) -> dict[str, Kernel]:
        if key not in self._tapes:
            assert tape is not None
            self._tapes[key] = {kernel.name: kernel for kernel in tape.kernels}
        return self._tapes[key]

    def _attention_works(self, layer: int, backward: bool, *names: str) -> list[Work]:
        key = f"attention {self.c.model.window(layer)}"
        if key not in self._tapes:
            self.kernels(key, attention(self.c.model, self.c.shapes, layer))
        return [work for name in names for work in self.b.works(self._tapes[key][name], backward)]

    def forward(self, layer: int, phase: str, graph: bool) -> None:
        """x (not owned) -> `out`. With a graph, buffers `….layer` stay for the backward."""
        b, moe = self.b, self.c.model.is_moe_layer(layer)
        self._norm_forward(layer, "norm1", self.u, self.w, "h", phase, graph, _A)
        self._attention_forward(layer, phase, graph)
        b.make("x1", self.u)
        b.drop("a")
        part = "router" if moe else "dense_ffn"
        self._norm_forward(layer, "norm2", self.u, self.w, "h", phase, graph, part)
        if moe:
            self._moe_forward(layer, phase, graph)
        else:
            self._ffn_forward(layer, phase, graph, self.c.model.intermediate_size, "dense_ffn")
        if phase == "recompute":  # stops once the last saved tensor is there
            self._keep(layer, graph, "h", "h2")
            self._keep(layer, graph and not self.cast, "x1", "x1")
            return
        b.make("out", self.u)
        b.drop("f")
        self._keep(layer, graph, "h", "h2")
        self._keep(layer, graph and not self.cast, "x1", "x1")
        b.compute("residual", part, phase, layer, [Work("memory_bound", bytes=6.0 * self.u, launches=2)])

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
        work = [Work("memory_bound", bytes=2.0 * u + 8.0 * w, launches=7)]
        b.compute(name, component, phase, layer, work)
        if self.cast:
            b.drop("wide")
            self._keep(layer, graph, f"{name}x", f"{name}x")
        self._keep(layer, graph, f"{name}n", f"{name}n")

    def _norm_backward(self, layer: int, name: str, u: int, w: int, component: str) -> None:
        """The gradient of a norm's output (owned by the caller) becomes that of its input."""
        b = self.b
        b.spike((4.5 if self.cast else 3.5) * w)
        work = [Work("memory_bound", bytes=2.0 * u + 24.0 * w, launches=16)]
        b.compute(name, component, "backward", layer, work)
        b.drop(*([f"{name}x.{layer}"] if self.cast else []), f"{name}n.{layer}")

    def _attention_forward(self, layer: int, phase: str, graph: bool) -> None:
        b, c = self.b, self.c
        works = self._attention_works(layer, False, "q_proj", "k_proj", "v_proj")
        b.make("q", self.q)
        b.make("k", self.kv)
        b.make("v", self.kv)
        if c.model.qk_norm == "head":
            for name, size in (("q", self.q), ("k", self.kv)):
                b.rename(name, f"{name}raw")
                self._norm_forward(layer, f"{name}norm", size, size // c.b * c.wide, name, phase, graph, _A)
                self._keep(layer, graph and not self.cast, f"{name}raw", f"{name}raw")
        for name, size in (("q", self.q), ("k", self.kv)):
            b.spike(2 * size)
            b.make(f"{name}r", size)
            works.append(Work("memory_bound", bytes=9.0 * size, launches=7))
        b.compute("projections", _A, phase, layer, works)
        core = {"qr": self.q, "kr": self.kv, "v": self.kv}
        if self.D > 1:
            core = self._trade_in(layer, phase)
        b.make("o", self.q)
        b.make("sums", self.lse)
        if self.repeats > 1:
            b.spike(2 * self.q // self.repeats)
        b.compute("attention_core", _A, phase, layer, self._attention_works(layer, False, "attention_core"))
        b.drop(*(name for name in ("q", "k") if name in b.alive))
        for name in core:
            self._keep(layer, graph, name, name)
        for name in {"qr", "kr", "v", "k_spread", "v_spread"} & set(b.alive):
            b.drop(name)
        self._keep(layer, graph, "sums", "sums")
        self._trade_out(layer, phase, graph)
        b.make("a", self.u)
        b.compute("o_proj", _A, phase, layer, self._attention_works(layer, False, "o_proj"))
        self._keep(layer, graph, "merged" if self.D > 1 else "o", "merged")
        self._keep(layer, graph, "h", "h1")

    def _trade_in(self, layer: int, phase: str) -> dict[str, int]:
        """Ulysses: q, k, v for whole sequences and this rank's heads."""
        b = self.b
        if self.kv_whole > self.kv:
            b.make("k_spread", self.kv_whole)
            b.make("v_spread", self.kv_whole)
        found = {"q_whole": self.q, "k_whole": self.kv_whole, "v_whole": self.kv_whole}
        for name, size in found.items():
            self._trade(name, size, layer, phase)
        return found

    def _trade(self, name: str, size: int, layer: int, phase: str) -> None:
        """Stacked, sent, put together: two copies on the way."""
        b = self.b
        b.make("stacked", size)
        b.make("traded", size)
        b.compute("stack", _A, phase, layer, [Work("memory_bound", bytes=2.0 * size)])
        op = b.issue("sequence exchange", "all_to_all", size, "sequence", _A, phase, layer)
        b.drop("stacked")
        b.make(name, size)
        b.compute("put together", _A, phase, layer, [Work("memory_bound", bytes=2.0 * size)], op)
        b.drop("traded")

    def _trade_out(self, layer: int, phase: str, graph: bool) -> None:
        if self.D > 1:
            self._trade("merged", self.q, layer, phase)
            self._keep(layer, graph, "o", "o")

    def _attention_backward(self, layer: int) -> None:
        """The gradient of `a` (the caller's) becomes `dh`."""
        b = self.b
        kernel = self._attention_works(layer, True, "o_proj")
        b.make("do", self.q)
        b.compute("o_proj", _A, "backward", layer, kernel)
        b.drop(f"merged.{layer}") if self.D > 1 else None
        if self.D > 1:
            self._trade("do_whole", self.q, layer, "backward")
            b.drop("do")
        grads = {"dq": self.q, "dk": self.kv_whole, "dv": self.kv_whole}
        for name, size in grads.items():
            b.make(name, size)
        if self.repeats > 1:
            b.spike(self.q // self.repeats + 2 * self.kv_whole)
        b.compute("attention_core", _A, "backward", layer, self._attention_works(layer, True, "attention_core"))
        whole = ("q_whole", "k_whole", "v_whole", "o") if self.D > 1 else ("qr", "kr", "v", "merged")
        b.drop("do_whole" if self.D > 1 else "do", *(f"{name}.{layer}" for name in (*whole, "sums")))
        if self.D > 1:
            for name, size in grads.items():
                self._trade(f"{name}_local", size, layer, "backward")
                b.drop(name)
                b.rename(f"{name}_local", name)
            if self.kv_whole > self.kv:
                for name in ("dk", "dv"):
                    b.rename(name, "wide_grad")
                    b.make(name, self.kv)
                    b.compute("sum copies", _A, "backward", layer, [Work("memory_bound", bytes=2.0 * self.kv_whole)])
                    b.drop("wide_grad")
        works = []
        for name, size in (("k", self.kv), ("q", self.q)):
            b.spike(2.5 * size)
            works.append(Work("memory_bound", bytes=14.0 * size, launches=9))
        b.compute("rotate", _A, "backward", layer, works)
        if self.c.model.qk_norm == "head":
            for name, size in (("k", self.kv), ("q", self.q)):
                self._norm_backward(layer, f"{name}norm", size, size // self.c.b * self.c.wide, _A)
                if not self.cast:
                    b.drop(f"{name}raw.{layer}")
        b.make("dh", self.u)
        b.spike(2 * self.u)
        works = self._attention_works(layer, True, "v_proj", "k_proj", "q_proj")
        works.append(Work("memory_bound", bytes=6.0 * self.u, launches=2))
        b.drop("dq", "dk", "dv")
        b.compute("projections", _A, "backward", layer, works)
        b.drop(f"h1.{layer}")

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
        works = [w for name in kernels for w in b.works(kernels[name], False) if not (redo and name == "down_proj")]
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

    def _moe_forward(self, layer: int, phase: str, graph: bool) -> None:
        b, c = self.b, self.c
        n, E, wide = self.N, c.model.num_local_experts, c.wide
        kernels = self.kernels("router", router(c.model, n, c.b, wide))
        if self.cast:
            b.make("hwide", self.w)
        b.spike(n * E * wide)
        b.make("scores", n * E * wide)
        b.make("weights", 2 * self.sent * wide)
        works = [work for kernel in kernels.values() for work in b.works(kernel, False)]
        b.compute("router", "router", phase, layer, works)
        if self.cast:
            self._keep(layer, graph, "hwide", "hwide")
        self._keep(layer, graph, "scores", "scores")
        self._dispatch(layer, phase)
        self._experts_forward(layer, phase, graph)
        self._return(layer, phase)
        width = c.model.shared_expert_intermediate_size
        if width or phase != "recompute":
            b.make("f", self.u, _D)
            work = [Work("memory_bound", bytes=float(self.sent * self.row + self.u))]
            b.compute("combine", "experts", phase, layer, work)
        self._keep(layer, graph, "home", "home")
        self._keep(layer, graph, "index", "index")
        self._keep(layer, graph, "weights", "weights")
        if width:
            b.rename("f", "routed")
            self._ffn_forward(layer, phase, graph, width, "shared_experts")
            if phase != "recompute":
                b.spike(self.u)
            b.drop("routed")

    def _exchange(self, source: str, target: str, size: int, layer: int, phase: str, name: str) -> None:
        b = self.b
        b.make(target, size, _D)
        b.flush("experts", phase, layer)
        op = b.issue(name, "all_to_all", float(max(self.arrived, self.sent) * self.row), "experts", "experts", phase, layer)
        b.drop(source)
        b.compute("arrived", "experts", phase, layer, [], op)

    def _regroup(self, name: str, size: int, layer: int, phase: str) -> None:
        """Blocks by rank to blocks by expert, or back: a copy, unless one expert or one rank is alone."""
        if self.c.model.num_local_experts == self.c.strategy.experts.degree:
            return
        b = self.b
        b.rename(name, "grouped_before")
        b.make(name, size, _D)
        b.compute("regroup", "experts", phase, layer, [Work("memory_bound", bytes=2.0 * size)])
        b.drop("grouped_before")

    def _dispatch(self, layer: int, phase: str) -> None:
        """Rows in expert order, over the wire, regrouped: `rows`."""
        b = self.b
        b.make("index", 16 * self.sent, _D)
        b.spike(8 * self.sent, _D)
        b.make("rows", self.sent * self.row, _D)
        work = [Work("memory_bound", bytes=2.0 * self.sent * self.row, launches=8)]
        b.compute("permute", "experts", phase, layer, work)
        if self.split:
            b.rename("rows", "spread")
            self._exchange("spread", "rows", self.arrived * self.row, layer, phase, "dispatch")
            self._regroup("rows", self.arrived * self.row, layer, phase)

    def _return(self, layer: int, phase: str) -> None:
        """`rows` back to their tokens, in token order: `home`."""
        b = self.b
        if self.split:
            self._regroup("rows", self.arrived * self.row, layer, phase)
            b.rename("rows", "leaving")
            self._exchange("leaving", "rows", self.sent * self.row, layer, phase, "combine")
        b.make("home", self.sent * self.row, _D)
        b.compute("permute back", "experts", phase, layer, [Work("memory_bound", bytes=2.0 * self.sent * self.row)])
        b.drop("rows")

    def _expert_works(self, backward: bool) -> list[Work]:
        tape = experts(self.c.model, self.routes, self.c.b, self.c.wide)
        kernels = self.kernels("experts", tape)
        return [w for name, kernel in kernels.items() if name != "route_weight" for w in self.b.works(kernel, backward)]

    def _experts_forward(self, layer: int, phase: str, graph: bool) -> None:
        b, unit = self.b, self.c.layers[layer][1]
        self.units.wait(unit, phase)
        inner, most = self.arrived * self.wing, max(self.routes) * self.wing
        if graph:
            b.make("inner", 4 * inner)
        else:
            b.spike(4 * most)
        b.make("parts", self.arrived * self.row)
        b.make("result", self.arrived * self.row)
        b.compute("experts", "experts", phase, layer, self._expert_works(False))
        b.drop("parts")
        self._keep(layer, graph, "rows", "rows")
        if graph:
            self._keep(layer, graph, "inner", "inner")
        b.rename("result", "rows")
        if phase == "forward" and self.c.strategy.dense.reshard_after_forward:
            self.units.release(unit)

    def backward(self, layer: int) -> None:
        """`dx` of the output becomes that of the input; gradients of the units are reduced."""
        b, c = self.b, self.c
        moe = c.model.is_moe_layer(layer)
        dense = c.layers[layer][0]
        if moe:
            self._moe_backward(layer)
            b.make(f"grads {dense.name}", dense.numel * c.b, "gathered_grads")
        else:
            b.make(f"grads {dense.name}", dense.numel * c.b, "gathered_grads")
            self._ffn_backward(layer, c.model.intermediate_size, "dense_ffn")
        b.drop(f"h2.{layer}")
        b.drop("dh")
        part = "router" if moe else "dense_ffn"
        self._norm_backward(layer, "norm2", self.u, self.w, part)
        b.spike(2 * self.u)
        if not self.cast:
            b.drop(f"x1.{layer}")
        self._attention_backward(layer)
        b.drop("dh")
        self._norm_backward(layer, "norm1", self.u, self.w, _A)
        b.spike(2 * self.u)
        b.compute("residual", _A, "backward", layer, [Work("memory_bound", bytes=6.0 * self.u, launches=2)])
        self.units.reduce(dense)

    def _moe_backward(self, layer: int) -> None:
        b, c = self.b, self.c
        width = c.model.shared_expert_intermediate_size
        if width:
            self._ffn_backward(layer, width, "shared_experts")
            b.rename("dh", "dh_shared")
        b.make("rows", self.sent * self.row)
        b.compute("combine", "experts", "backward", layer, [Work("memory_bound", bytes=3.0 * self.sent * self.row)])
        b.drop(f"home.{layer}")
        if self.split:
            b.make("spread", self.sent * self.row, _D)
            b.drop("rows")
            self._exchange("spread", "rows", self.arrived * self.row, layer, "backward", "combine")
            self._regroup("rows", self.arrived * self.row, layer, "backward")
        self._experts_backward(layer)
        if self.split:
            self._regroup("rows", self.arrived * self.row, layer, "backward")
            b.rename("rows", "leaving")
            self._exchange("leaving", "rows", self.sent * self.row, layer, "backward", "dispatch")
        b.spike(self.sent * self.row, _D)
        b.make("dh", self.u, _D)
        b.compute("permute back", "experts", "backward", layer, [Work("memory_bound", bytes=4.0 * self.sent * self.row)])
        b.drop("rows", f"index.{layer}")
        kernels = self.kernels("router")
        b.spike(3 * self.N * c.model.num_local_experts * c.wide)
        b.spike((self.w if self.cast else 0) + 2 * self.u)
        works = [work for kernel in kernels.values() for work in b.works(kernel, True)]
        b.compute("router", "router", "backward", layer, works)
        b.drop(f"scores.{layer}", f"weights.{layer}", *([f"hwide.{layer}"] if self.cast else []))
        if width:
            b.drop("dh_shared")

    def _experts_backward(self, layer: int) -> None:
        """Gradients of the output `rows` become those of the input; each expert's weight gradients, then their stacks."""
        b, c = self.b, self.c
        unit = c.layers[layer][1]
        size = self.arrived * self.row
        b.make(f"grads {unit.name}", unit.numel * c.b, "gathered_grads")
        b.spike(3 * max(self.routes) * self.wing)
        b.make("drows", size)
        b.compute("experts", "experts", "backward", layer, self._expert_works(True))
        b.drop(f"inner.{layer}")
        b.spike(unit.largest * c.b)
        b.make("together", size)
        b.compute("experts", "experts", "backward", layer, [Work("memory_bound", bytes=4.0 * size + 2.0 * unit.numel * c.b, launches=4)])
        b.drop("drows", "rows", f"rows.{layer}")
        b.rename("together", "rows")
        self.units.reduce(unit)
