"""Router and routed experts under autograd: one chunk whose rows live until the backward has used them.

mopexec.modules.experts and mopexec.model.transformer. Buffers: what frames and saved tensors hold.
"""

from dataclasses import replace

from mopsim.layers.experts import experts, router
from mopsim.lowering.fsdp.block import FsdpBlock
from mopsim.lowering.workload import Work, memory_work

_D = "dispatch"


class FsdpMoE(FsdpBlock):
    """The MoE half of a layer."""

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
        if self.split:  # how many routes go where
            counted = b.issue("counts", "all_to_all", 8.0 * E, "experts", "router", phase, layer)
            b.compute("counts", "router", phase, layer, [], counted, awaited=True)
        self._move_experts(layer, phase)
        self._dispatch(layer, phase)
        self._experts_forward(layer, phase, graph)
        if self.moving and not graph:
            b.drop(f"migrated.{layer}", f"packed.{layer}")
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

    def _move_experts(self, layer: int, phase: str) -> None:
        """Weights of experts that least-loaded placement moves arrive, beside the rank's own."""
        if self.moving:
            self.b.run(self.moving.forward(graph=True), phase, layer, [self.b.last])
            for name in ("migrated", "packed"):
                self.b.adopt(f"{name}.{layer}", self.moving.values[name].bytes, "gathered")

    def _return_gradients(self, layer: int) -> None:
        """Gradients of moved experts go home."""
        if self.moving:
            self.b.run(self.moving.backward(), "backward", layer)
            for name in ("packed gradient", f"migrated.{layer}"):  # the tape has freed them
                del self.b.alive[name]
            self.b.drop(f"packed.{layer}")

    def _exchange(self, source: str, target: str, size: int, layer: int, phase: str, name: str) -> None:
        b = self.b
        b.make(target, size, _D)
        b.flush("experts", phase, layer)
        op = b.issue(
            name,
            "all_to_all",
            float(max(self.arrived, self.sent) * self.row),
            "experts",
            "experts",
            phase,
            layer,
        )
        b.drop(source)
        b.compute("arrived", "experts", phase, layer, [], op)

    def _regroup(self, name: str, size: int, layer: int, phase: str) -> None:
        """Blocks by rank to blocks by expert, or back: a copy, unless one expert or one rank is alone."""
        if self.c.model.num_local_experts == self.c.strategy.experts.degree:
            return
        b = self.b
        b.rename(name, "grouped_before")
        b.make(name, size, _D)
        b.compute("regroup", "experts", phase, layer, [memory_work(2.0 * size, 1, indexed=True)])
        b.drop("grouped_before")

    def _dispatch(self, layer: int, phase: str) -> None:
        """Rows in expert order, over the wire, regrouped: `rows`."""
        b = self.b
        b.make("index", 16 * self.sent, _D)
        b.spike(8 * self.sent, _D)
        b.make("rows", self.sent * self.row, _D)
        work = [memory_work(2.0 * self.sent * self.row, 8, indexed=True)]
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
        b.compute(
            "permute back",
            "experts",
            phase,
            layer,
            [memory_work(2.0 * self.sent * self.row, 1, indexed=True)],
        )
        b.drop("rows")

    def _expert_works(self, backward: bool) -> list[Work]:
        tape = experts(self.c.model, self.routes, self.c.b, self.c.wide)
        kernels = self.kernels("experts", tape)
        works = [
            w
            for name, kernel in kernels.items()
            if name != "route_weight"
            for w in self.b.works(kernel, backward)
        ]
        if self.b.dtype == "bfloat16":  # one grouped product; other dtypes take one an expert
            return works
        return [replace(w, launches=int(w.count)) if w.kind == "grouped_matmul" else w for w in works]

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
        if phase == "forward" and self.c.reshards:
            self.units.release(unit)

    def _moe_backward(self, layer: int) -> None:
        b, c = self.b, self.c
        width = c.model.shared_expert_intermediate_size
        if width:
            self._ffn_backward(layer, width, "shared_experts")
            b.rename("dh", "dh_shared")
        b.make("rows", self.sent * self.row)
        b.compute(
            "combine", "experts", "backward", layer, [Work("memory_bound", bytes=3.0 * self.sent * self.row)]
        )
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
        b.compute(
            "permute back",
            "experts",
            "backward",
            layer,
            [memory_work(4.0 * self.sent * self.row, 1, indexed=True)],
        )
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
        """Gradients of the output `rows` become those of the input; each expert's weight gradients, then
        their stacks."""
        b, c = self.b, self.c
        unit = c.layers[layer][1]
        size = self.arrived * self.row
        b.make(f"grads {unit.name}", unit.numel * c.b, "gathered_grads")
        if self.moving:
            b.make("packed gradient", self.moving.values["packed"].bytes, "gathered")
        b.spike(3 * max(self.routes) * self.wing)
        b.make("drows", size)
        b.compute("experts", "experts", "backward", layer, self._expert_works(True))
        b.drop(f"inner.{layer}")
        b.spike(unit.largest * c.b)
        b.make("together", size)
        b.compute(
            "experts",
            "experts",
            "backward",
            layer,
            [Work("memory_bound", bytes=4.0 * size + 2.0 * unit.numel * c.b, launches=4)],
        )
        b.drop("drows", "rows", f"rows.{layer}")
        b.rename("together", "rows")
        self._return_gradients(layer)
        self.units.reduce(unit)
