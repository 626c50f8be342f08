"""Parts of a layer of which no pair is written, from their tapes: attention whose projections autograd runs,
and experts whose backward autograd runs."""

from collections.abc import Sequence

from msgspec.structs import replace

from mopsim.graph.attention import attention
from mopsim.graph.experts import router
from mopsim.graph.liveness import NOTHING, Recomputation, backward, everything, forward
from mopsim.graph.rewrites.recompute import plan
from mopsim.graph.tape import Kernel, Tape
from mopsim.program.builder import Builder, Recorder
from mopsim.program.context import Context
from mopsim.program.fragment import kept_experts
from mopsim.program.pairs.rows import Rows
from mopsim.program.taped import play
from mopsim.program.works import attended, projected


class TapedAttention:
    """x1 = x + o_proj(attention(norm(x))), as AttentionPair: a recomputation keeps what the core's backward
    needs; the rest is made a third time where the backward comes to it (mopexec.flat.composed)."""

    def __init__(self, context: Context, recorder: Recorder) -> None:
        self.c, self.b = context, recorder

    def forward(self, layer: int, *waits: int | None) -> None:
        self._play(layer, "forward", False, waits)

    def recompute(self, layer: int, *waits: int | None) -> None:
        """Makes `x1` and keeps what the backward needs."""
        self._play(layer, "recompute", True, waits)

    def backward(self, layer: int) -> None:
        """The gradient of x1 becomes that of x: one takes the other's place. The projections run again, with
        all that autograd keeps of them, beside the gradients of their results, which go last."""
        c, b, tape = self.c, self.b, self._tape(layer)
        before, after = _parts(tape, c.stack.kernels.rotary, c.wide > c.b)
        again, values = everything(before), before.values
        last = play(b, c, backward(after, _around_core(after)), "backward", layer)
        b.cut("core")
        last = play(b, c, forward(before, again), "backward", layer, [last])
        play(b, c, backward(before, again), "backward", layer, [last])
        for name in before.outputs:
            b.adopt(f"{name} again", values[name].bytes)
            b.adopt(f"grad {name}", values[name].bytes)
        b.drop(*(f"{word}" for name in before.outputs for word in (f"{name} again", f"grad {name}")))
        b.adopt("grad_hidden", c.hidden)
        b.drop("grad_hidden")

    def _play(self, layer: int, phase: str, graph: bool, waits: tuple[int | None, ...]) -> None:
        tape = self._tape(layer)
        play(self.b, self.c, forward(tape, _around_core(tape) if graph else NOTHING), phase, layer, waits)
        self.b.adopt("x1", self.c.hidden)

    def _tape(self, layer: int) -> Tape:
        tape = attention(self.c.model, self.c.shapes, layer)
        kernels = attended(projected(tape.kernels, self.c), self.c)
        names = [kernel.name for kernel in kernels]
        split = (("q0", "rope"),) if "q_split" in names else ()
        return replace(tape, kernels=kernels, held=(("h", names[_core_at(kernels) - 1]), *split))


def _parts(tape: Tape, rotary: str, wider: bool) -> tuple[Tape, Tape]:
    """What makes queries, keys and values, and what follows. rotary: Kernels.rotary. wider: than what is
    computed in is fp32."""
    at = _core_at(tape.kernels)
    traded = [kernel.reads[0] for kernel in tape.kernels[at:] if kernel.name == "stack"]
    results = tuple(traded[:3]) or tape.kernels[at].reads[:3]
    given = tuple(tape.values[name] for name in results)
    cast, fused = rotary == "wide" and wider, rotary == "fused"
    held = tuple(_held(kernel, results, cast, fused) for kernel in tape.kernels[:at])
    before = replace(tape, kernels=held, outputs=results)
    return before, replace(tape, inputs=(*tape.inputs, *given), kernels=tape.kernels[at:])


def _core_at(kernels: Sequence[Kernel]) -> int:
    """Place of the core, or of the exchange before it."""
    return next(i for i, kernel in enumerate(kernels) if kernel.name in ("stack", "attention_core"))


def _held(kernel: Kernel, results: tuple[str, ...], cast: bool, fused: bool) -> Kernel:
    """Whoever asks for the backward holds the gradients of results until its end, those too that a rotation
    would be done with once they are cast, or a composed norm. Of what is normed after it a fused rotation is
    done with the gradient before it puts those of its slices together."""
    if not kernel.writes:
        return kernel
    rotates, size = kernel.name.startswith("rope_"), kernel.writes[0].bytes
    if kernel.writes[0].name not in results:
        if not (fused and rotates and kernel.back_scratch):
            return kernel
        ((category, whole),) = kernel.back_scratch
        return replace(kernel, back_scratch=((category, whole - size),))
    composed = kernel.name.endswith("_norm") and bool(kernel.back_scratch)
    early = composed or (cast and rotates)
    more = (("activations", size),) if early else ()
    given = tuple(replace(one, grad=False) for one in kernel.writes)
    return replace(kernel, writes=given, back_scratch=(*kernel.back_scratch, *more))


def _around_core(tape: Tape) -> Recomputation:
    """The core's inputs and results are kept; what is before it, and its exchanged output, are made again."""
    core = next(i for i, kernel in enumerate(tape.kernels) if kernel.name == "attention_core")
    kept = frozenset(tape.kernels[core].saves)
    dropped = frozenset(tape.kept) - kept
    product = next(i for i, kernel in enumerate(tape.kernels) if kernel.name == "o_proj")
    home = frozenset(i for i in range(core + 1, product) if tape.kernels[i].writes)
    return Recomputation(dropped, (home,) if home else (), kept)


class TapedExperts(Rows):
    """The backward of experts whose inputs the layer's recomputation dispatches and keeps (arXiv 2609.14306):
    as NestedExperts, in autograd's order."""

    def __init__(self, context: Context, builder: Builder) -> None:
        super().__init__(context, builder)
        self.router = router(context.model, context.tokens, context.b, context.wide)

    def backward(self, layer: int, *waits: int | None) -> None:
        """The gradient of x2 becomes that of x1, in place."""
        c, b = self.c, self.b
        H, tokens, tape = c.model.hidden_size, c.tokens, kept_experts(c)
        chosen = plan(tape, "none", ())
        last = b.compute("norm", "router", "recompute", layer, [self.norm(tokens, H, "hidden")])
        last = play(b, c, forward(self.router, everything(self.router)), "recompute", layer, [last])
        for name in ("choice", "weight"):
            b.adopt(name, self.router.values[name].bytes)
        last = play(b, c, forward(tape, chosen), "recompute", layer, [last, *waits])
        last = play(b, c, backward(tape, chosen), "backward", layer, [last])
        b.adopt("grad_hidden", c.hidden)
        if any("weight" in kernel.reads for kernel in tape.kernels):  # whose backward makes its gradient
            b.drop("weight")
        else:  # its gradient takes its place, and dies in the router's backward
            del b.alive["weight"]
        play(b, c, backward(self.router, everything(self.router)), "backward", layer, [last])
        b.adopt("grad_router", c.hidden)
        b.drop("grad_router", "choice")
        norm = self.norm_backward(tokens, H)
        b.compute("norm", "router", "backward", layer, [norm])
        b.drop("grad_hidden", "hidden", f"choice{layer}")
