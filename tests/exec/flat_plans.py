"""Small plans for tests of flat_units."""

from typing import Any

import msgspec

from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import HardwareRef, Plan
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import DEFAULT_STACK, Precision, Strategy
from mopsim.spec.training import TrainSpec

MODEL = ModelSpec(
    name="parity",
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=37,
    intermediate_size=20,
    first_k_dense_replace=1,
    num_local_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=12,
    shared_expert_intermediate_size=10,
    qk_norm="head",
    scoring_func="sigmoid",
    routed_scaling_factor=1.5,
)


def precision(dtype: str) -> Precision:
    """Everything in one dtype."""
    values: dict[str, Any] = dict.fromkeys(("compute", "param", "reduce", "grad", "moments"), dtype)
    return Precision(**values, master="float64" if dtype == "float64" else "float32")


def make_plan(
    world: int, changes: dict[str, dict[str, Any]], *, dtype: str = "float64", model: ModelSpec = MODEL,
    training: dict[str, Any] | None = None, micro_batch: int = 1, device_kind: str = "cpu",
    stack: str = DEFAULT_STACK,
) -> Plan:  # fmt: skip
    """A plan of ZeRO-3 over all ranks with `changes` per component of the strategy. Of microbatches it has
    the first, one between and the last, of more than two groups of data fewer."""
    base = Strategy(
        name="test", world_size=world, micro_batch=micro_batch, precision=precision(dtype), stack=stack
    )
    base = msgspec.structs.replace(base, dense=msgspec.structs.replace(base.dense, fsdp=world))
    fields = {
        name: msgspec.structs.replace(getattr(base, name), **values) for name, values in changes.items()
    }
    strategy = msgspec.structs.replace(base, **fields)
    train: dict[str, Any] = {
        "seq_len": 16, "global_batch": min(8, 3 * strategy.data_groups * micro_batch), "learning_rate": 2e-3,
        "clip_norm": 0.02, "bias_update_rate": 0.05,
    }  # fmt: skip
    hardware = HardwareRef(
        name="test", digest="0", num_nodes=1, devices_per_node=world, memory_limit=1 << 30, host_limit=1 << 30
    )
    return Plan(
        model=model,
        hardware=hardware,
        strategy=strategy,
        training=TrainSpec(**(train | (training or {}))),
        stack=load_stack(strategy.stack).on_kind(device_kind),
    )
