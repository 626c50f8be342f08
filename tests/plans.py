"""Plans for tests, whatever the machine."""

from typing import Any

from msgspec.structs import replace

from mopsim import strategies
from mopsim.common import io
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import HardwareRef, Plan
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec


def plan_of(model: ModelSpec, strategy: Strategy, training: TrainSpec, kind: str = "") -> Plan:
    """On nodes of eight devices without limits. kind: of the devices, where their kernels matter."""
    stack = load_stack(strategy.stack)
    hardware = HardwareRef(
        name="any", digest="0", num_nodes=-(-strategy.world_size // 8), devices_per_node=8,
        memory_limit=1 << 60, host_limit=1 << 60,
    )  # fmt: skip
    return Plan(
        model=model, hardware=hardware, strategy=stack.resolve(strategy), training=training,
        stack=stack.on_kind(kind) if kind else stack,
    )  # fmt: skip


def changed(strategy: Strategy, **parts: dict[str, Any]) -> Strategy:
    """The strategy with fields of its components replaced."""
    plain = io.to_plain(strategy)
    for part, fields in parts.items():
        plain[part].update(fields)
    return io.convert(plain, Strategy, "strategy")


def split(world: int, **options: Any) -> Strategy:
    """Megatron's layout as split_modules runs it."""
    return replace(strategies.megatron(world, **options), stack="mopexec-split")
