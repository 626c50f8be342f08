"""Parts of a layer as workloads of their own, as benchmarks of operators run them."""

from msgspec.structs import replace

from mopsim.graph.experts import routed
from mopsim.graph.liveness import backward, forward
from mopsim.graph.rewrites.migration import migrating
from mopsim.graph.rewrites.recompute import plan
from mopsim.graph.tape import Tape
from mopsim.program.builder import Builder
from mopsim.program.context import Context, make_context
from mopsim.program.taped import play
from mopsim.program.workload import Program, Work, Workload
from mopsim.program.works import chunked
from mopsim.spec.model import ModelSpec
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec


def kept_experts(context: Context) -> Tape:
    """Routed experts whose inputs are kept for the backward: of one chunk with all that products keep; of
    several what arrived for each, from which the products run again.

    A caller in Python holds the output of one chunk until it is home, and under least-loaded placement what
    arrived as well (both as in the code of arXiv 2601.17111).
    """
    c, split = context, context.groups["experts"].size > 1
    tensor, moved = c.strategy.experts.expert_tensor_parallel, c.migration if split else None
    tape = routed(c.model, c.tokens, c.routes(), c.b, split, tensor)
    kernels = migrating(tape.kernels, moved) if moved else tape.kernels
    held = () if c.chunks > 1 else (("out", ""), ("arrived", "")) if moved else (("out", ""),)
    return replace(tape, kernels=chunked(kernels, c, "sort"), held=held)


def expert_layer(
    model: ModelSpec, strategy: Strategy, training: TrainSpec, domain: int, stack: Stack
) -> Workload:
    """Routed experts of one layer, forward and backward, with routing given: x [N, H] -> sum of its routes.

    Resident: x and the rank's experts. No gradients of weights are kept. Raises SpecError where the inputs do
    not fit together.
    """
    context = make_context(model, strategy, training, domain, stack)
    builder, tape = Builder(context.groups), kept_experts(context)
    chosen = plan(tape, "none", ())
    builder.make("out", context.hidden)
    start = builder.add("start", "compute", "experts", "forward")
    end = play(builder, context, forward(tape, chosen), "forward", 0, [start])
    end = play(builder, context, backward(tape, chosen), "backward", 0, [end])
    builder.adopt("dx", context.hidden)
    builder.drop("dx", "out")
    work = (Work("memory_bound", bytes=2.0 * context.hidden),)
    builder.add("end", "compute", "experts", "backward", work, [end])
    unit = context.layers[0][1]
    resident = ("params", unit.numel * context.b), ("activations", context.hidden)
    return Workload((Program(tuple(builder.ops), resident=resident),), 1, 1, 0.0, stack=stack)
