"""What a strategy asks for that acts on nothing, and what a profile lacks for what its program does."""

from mopsim.api.inputs import Inputs
from mopsim.graph.rewrites.recompute import members
from mopsim.program.context import Context, make_context
from mopsim.program.lower import passes_of
from mopsim.spec.categories import JOINED
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import Strategy


def idle(strategy: Strategy, stack: Stack, inputs: Inputs) -> list[str]:
    """Notes of a job that was simulated: recomputed modules and kept kernels that no layer has, and chunks
    of rows whose waits the profile does not know."""
    asked = strategy.activations
    sends = strategy.experts.token_dispatcher == "deepep"
    if not (asked.modules_again or asked.save_ops or sends):
        return []
    domain, on = inputs.hardware.scale_up_size, inputs.hardware.device.architecture
    context = make_context(inputs.model, strategy, inputs.training, domain, stack, on)
    found = [
        f"note: {strategy.name}: activations.{field} {', '.join(names)}: acts on nothing, no layer of "
        f"{inputs.model.name} has it on the stack {stack.name}"
        for field, names in _absent(context, asked.modules_again, asked.save_ops).items()
        if names
    ]
    group = context.groups["experts"]
    if group.chunk and group.intra == group.size and inputs.hardware.scale_up.rounds is None:
        found.append(
            f"note: {strategy.name}: {inputs.hardware.name} has no scale_up.rounds: rows that the stack "
            f"{stack.name} sends in chunks (kernels.sent_rows) are timed as if sent whole"
        )
    return found


def _absent(context: Context, modules: tuple[str, ...], kernels: tuple[str, ...]) -> dict[str, list[str]]:
    """By field, the names of which no layer has a kernel."""
    passes, model = passes_of(context), context.model
    layers = range(model.num_hidden_layers + model.num_nextn_predict_layers)
    tapes = [passes.tape(layer) for layer in {passes.key(layer): layer for layer in layers}.values()]
    within = context.stack.kernels.norm_within
    named = {kernel.name for tape in tapes for kernel in tape.kernels if kernel.kind != "view"}
    named |= {part for name, parts in JOINED.items() if name in named for part in parts}
    return {
        "modules": [name for name in modules if not any(members(tape, name, within) for tape in tapes)],
        "save_ops": [name for name in kernels if name not in named],
    }
