"""A decoder layer under autograd: forward without or with a graph, and backward (mopexec.model.transformer).

A checkpointed forward keeps nothing; its recompute keeps what the backward needs.
"""

from mopsim.lowering.fsdp.attention import FsdpAttention
from mopsim.lowering.fsdp.moe import FsdpMoE
from mopsim.lowering.workload import Work

_A = "attention"


class FsdpLayer(FsdpAttention, FsdpMoE):
    """Lowers one layer at a time."""

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
