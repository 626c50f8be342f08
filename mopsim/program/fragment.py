"""Parts of a layer as workloads of their own, as benchmarks of operators run them."""

from mopsim.program.builder import Builder
from mopsim.program.context import make_context
from mopsim.program.pairs.kept_experts import KeptExperts
from mopsim.program.workload import Work, Workload
from mopsim.spec.model import ModelSpec
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec


def expert_layer(
    model: ModelSpec, strategy: Strategy, training: TrainSpec, domain: int, stack: Stack
) -> Workload:
    """Routed experts of one layer, forward and backward, with routing given: x [N, H] -> sum of its routes.

    Kept from forward to backward: every intermediate, or what arrived for each of several chunks. Resident: x
    and the rank's experts. No gradients of weights are kept. Raises SpecError where the inputs do not fit
    together.
    """
    context = make_context(model, strategy, training, domain, stack)
    builder = Builder(context.groups)
    part = KeptExperts(context, builder)
    builder.mark(0)
    builder.make("out", context.hidden)
    start = builder.add("start", "compute", "experts", "forward")
    end = part.forward(0, "forward", [start])
    builder.make("dx", context.hidden)
    end = part.backward(0, [end])
    builder.drop("dx", "out")
    builder.add(
        "end",
        "compute",
        "experts",
        "backward",
        (Work("memory_bound", bytes=2.0 * context.hidden),),
        deps=[end],
    )
    unit = context.layers[0][1]
    resident = [("params", unit.numel * context.b), ("activations", context.hidden)]
    return Workload((builder.program(0, strategy.stage_ranks, resident),), 1, 1, 0.0, stack=stack)
