"""Buffers that live through the whole step, by category and tier."""

from mopsim.common.units import DTYPE_BYTES
from mopsim.layers.tape import Step
from mopsim.lowering.context import Context


def resident(context: Context) -> tuple[Step, ...]:
    """Parameter, gradient and optimizer shards of one rank, and the routers' balancing biases."""
    strategy, precision = context.strategy, context.strategy.precision
    found: list[Step] = []
    for unit in context.units():
        place = strategy.experts if unit.component == "experts" else strategy.dense
        zero = strategy.dense.zero
        full = unit.padded
        held = unit.shard_numel if context.shards_params else full
        reduced = unit.shard_numel if zero >= 2 else full
        found.append((_at(place.param_tier, "params"), held * context.param))
        if not context.stack.sharding.fsdp:  # FSDP2's gradients come and go within the step
            found.append((_at(place.grad_tier, "grads"), reduced * context.grad))
        state = unit.shard_numel if zero >= 1 else full
        moments = 2 * state * int(DTYPE_BYTES[precision.moments])
        master = 0 if precision.master == "param" else state * int(DTYPE_BYTES[precision.master])
        on_host = strategy.optimizer.host_fraction if strategy.optimizer.state_tier == "host" else 0.0
        away = int((moments + master) * on_host)
        found.append(("host/optimizer", away))
        found.append(("optimizer", moments + master - away))
    found += _others(context)
    return tuple(step for step in found if step[1])


def _others(context: Context) -> list[Step]:
    """Batches, rotary tables, routing state; offloaded boundaries and the host's staging."""
    model, strategy = context.model, context.strategy
    batches = 2 * 8 * context.tokens * context.training.num_microbatches(strategy)
    positions = context.training.seq_len // strategy.attention.sequence
    found: list[Step] = [("activations", batches + positions * model.head_dim * context.b)]
    found.append(("params", 8 * max(1, model.num_moe_layers) * max(1, model.num_local_experts)))
    found.append(("host/boundaries", context.offloaded * context.hidden))
    if not context.stack.sharding.fsdp and strategy.optimizer.update_on == "host":
        numels = [unit.shard_numel for unit in context.units()]
        largest = min(strategy.optimizer.bucket_params, sum(numels))
        master = (
            strategy.precision.param if strategy.precision.master == "param" else strategy.precision.master
        )
        wide = 8 if master == "float64" else 4
        found.append(("host/staging", 2 * largest * (wide + context.param)))
    return found


def _at(tier: str, category: str) -> str:
    return f"host/{category}" if tier == "host" else category
