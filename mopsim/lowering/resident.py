"""Buffers that live through the whole step, by category and tier."""

from mopsim.layers.tape import Step
from mopsim.lowering.context import Context
from mopsim.spec.units import DTYPE_BYTES


def resident(context: Context) -> tuple[Step, ...]:
    """Parameter, gradient and optimizer shards of one rank, and the routers' balancing biases."""
    strategy, precision = context.strategy, context.strategy.precision
    found: list[Step] = []
    for unit in context.units():
        place = strategy.experts if unit.component == "experts" else strategy.dense
        zero = strategy.dense.zero
        full = unit.padded
        held = unit.shard_numel if zero == 3 else full
        reduced = unit.shard_numel if zero >= 2 else full
        found.append((_at(place.param_tier, "params"), held * context.param))
        found.append((_at(place.grad_tier, "grads"), reduced * context.grad))
        state = unit.shard_numel if zero >= 1 else full
        moments = 2 * state * int(DTYPE_BYTES[precision.moments])
        master = 0 if precision.master == "param" else state * int(DTYPE_BYTES[precision.master])
        on_host = strategy.optimizer.host_fraction if strategy.optimizer.state_tier == "host" else 0.0
        away = int((moments + master) * on_host)
        found.append(("host/optimizer", away))
        found.append(("optimizer", moments + master - away))
    return tuple(step for step in found if step[1])


def _at(tier: str, category: str) -> str:
    return f"host/{category}" if tier == "host" else category
