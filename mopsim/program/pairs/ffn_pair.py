"""Dense FFN and shared experts over token slices, each recomputed in its own backward
(mopexec.operators.ffn)."""

from mopsim.graph.ffn import ffn
from mopsim.graph.shapes import Shapes
from mopsim.graph.tape import Kernel, Matmul
from mopsim.program.builder import Builder
from mopsim.program.casts import Part
from mopsim.program.context import Context
from mopsim.program.pairs.rows import Rows
from mopsim.program.workload import Work
from mopsim.program.works import works
from mopsim.spec.layout import token_slices


class FfnPair(Rows):
    """x += ffn(norm(x)) in place, and its backward into the gradient, slice by slice."""

    def __init__(self, context: Context, builder: Builder) -> None:
        super().__init__(context, builder)
        self.gated = context.model.ffn_matrices == 3
        self.up = ("gate_proj", "up_proj") if self.gated else ("up_proj",)

    def inner(self, component: str) -> int:
        model = self.c.model
        return model.intermediate_size if component == "dense_ffn" else model.shared_expert_intermediate_size

    def forward(self, tokens: int, component: str, layer: int, *waits: int | None) -> None:
        b, H = self.b, self.c.model.hidden_size
        for start, stop in token_slices(tokens, self.c.strategy.dense.chunk_tokens):
            n = stop - start
            hidden = n * H * self.c.b
            works = [self.norm(n, H, "hidden")]
            if self._scaled(component):
                works += self._scaled_output(n, component)
                works += [*self._share(n, "forward"), self.elementwise(hidden, 3, 1)]
                b.drop("shared_out", "share", "hidden")
            else:
                works += self._output(n, component)
                b.drop("hidden")
            if self._biased(component):
                works.append(self.elementwise(hidden, 2, 1))
            b.compute("ffn", component, "forward", layer, works, *waits)

    def _output(self, tokens: int, component: str) -> list[Work]:
        """Added in place to what is there."""
        b, size = self.b, tokens * self.inner(component) * self.c.b
        if self.gated:
            b.make("gate", size)
        b.make("up", size)
        works = self._products(tokens, component, False, *self.up)
        if self.gated:
            b.drop("up")
        works.append(self._activation(size))
        works += self._products(tokens, component, False, "down_proj")
        b.drop("gate" if self.gated else "up")
        return [*works, self.elementwise(tokens * self.c.model.hidden_size * self.c.b, 1, 0)]

    def _scaled(self, component: str) -> bool:
        return self.c.model.shared_expert_gate and component == "shared_experts"

    def _scaled_output(self, tokens: int, component: str) -> list[Work]:
        """Into `shared_out`, zeros before, as it is before the gate."""
        size = tokens * self.c.model.hidden_size * self.c.b
        self.b.make("shared_out", size)
        return [self.elementwise(size, 1, 1), *self._output(tokens, component)]

    def _share(self, tokens: int, part: Part) -> list[Work]:
        """The gate's product of one column, forward with its sigmoid: `share`."""
        shape = (Matmul(tokens, 1, self.c.model.hidden_size),)
        found = list(
            works(Kernel("shared_gate", "matmul", "shared_experts", (), (), matmuls=shape), part, self.c)
        )
        if part != "forward":
            return found
        self.b.make("share", tokens * self.c.b)
        return [*found, self.elementwise(tokens * self.c.b, 2, 1)]

    def _gate_backward(self, tokens: int, component: str) -> list[Work]:
        """The output once more for the gradient of the gate's logit, and `grad_out`, that of the output
        (mopexec.operators.ffn: shared_backward)."""
        b, size = self.b, tokens * self.c.model.hidden_size * self.c.b
        found = [*self._share(tokens, "forward"), *self._scaled_output(tokens, component)]
        b.make("grad_logit", tokens * self.c.b)
        b.spike(tokens * self.c.b)
        b.drop("shared_out")
        b.make("grad_out", size)
        self.weight_gradient(self.c.model.hidden_size)
        found += [self.elementwise(size, 6, 3), self.elementwise(tokens * self.c.b, 5, 3)]
        return [*found, *self._share(tokens, "weight_grad"), self.elementwise(size, 2, 1)]

    def backward(self, tokens: int, component: str, layer: int) -> None:
        """All slices: recompute, gradients of weights and input, through the norm into the gradient."""
        b, H = self.b, self.c.model.hidden_size
        for start, stop in token_slices(tokens, self.c.strategy.dense.chunk_tokens):
            n = stop - start
            size = n * self.inner(component) * self.c.b
            works = [self.norm(n, H, "hidden")]
            if self._scaled(component):
                works += self._gate_backward(n, component)
            wings = ("gate", "up") if self.gated else ("up",)
            kept = wings if self.fused_gate else (*wings, *(("silu",) if self.gated else ()), "inner")
            for name in kept:
                b.make(name, size)
            works += self._products(n, component, False, *self.up)
            if not self.fused_gate:
                works.append(self._activation(size))
                self._temporary(component)
                b.drop("inner")
            b.make("grad_inner", size)
            if self.fused_gate:
                self._temporary(component)
            works += self._products(n, component, True, "down_proj")
            if self.fused_gate:
                works.append(self.elementwise(size, 2 * len(wings) + 2, len(wings) + 1))
                b.drop("grad_inner")
            else:
                works.append(self.elementwise(size, 11, 4) if self.gated else self._activation(size, 3))
                b.drop(*wings)
            self._temporary(component)
            b.make("grad_hidden", n * H * self.c.b)
            works += self._products(n, component, True, *self.up)
            done = wings if self.fused_gate else ("grad_inner", "silu") if self.gated else ("grad_inner",)
            b.drop(*done, *(("grad_out", "grad_logit", "share") if self._scaled(component) else ()), "hidden")
            if self._biased(component):  # a sum of each product's gradients
                works.append(self.elementwise(len(wings) * size + n * H * self.c.b, 1, 2 * (len(wings) + 1)))
            works.append(self.norm_backward(n, H))
            b.drop("grad_hidden")
            b.compute("ffn", component, "backward", layer, works)

    def shared(self, layer: int, tokens: int = 0, *, backward: bool) -> None:
        """The shared experts of `tokens` rows (all: 0), where there are any."""
        if not self.c.model.shared_expert_intermediate_size:
            return
        run = self.backward if backward else self.forward
        run(tokens or self.c.tokens, "shared_experts", layer)

    def _biased(self, component: str) -> bool:
        return self.c.model.ffn_bias and component == "dense_ffn"

    def _activation(self, size: int, passes: int = 2) -> Work:
        """SiLU and a product, or GELU, over `size` bytes."""
        if self.gated and self.fused_gate:
            return self.elementwise(size, 3, 1)
        return self.elementwise(size, 5 if self.gated else passes, 2 if self.gated else 1)

    def _products(self, tokens: int, component: str, backward: bool, *names: str) -> list[Work]:
        shapes = Shapes(tokens, tokens, width=self.c.b)
        tape = ffn(self.c.model, self.inner(component), component, shapes)
        return self.works(tape, backward, *names)

    def _temporary(self, component: str) -> None:
        self.weight_gradient(self.inner(component) * self.c.model.hidden_size)
