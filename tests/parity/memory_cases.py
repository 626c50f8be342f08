"""Plans whose memory is compared between a dry run and real gloo training: every mechanism on, small."""

from typing import Any

import msgspec

from mopsim import strategies
from mopsim.common import io
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import HardwareRef, Plan
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec

SEQ = 256
MODEL = ModelSpec(
    name="parity", hidden_size=64, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
    head_dim=16, vocab_size=151, intermediate_size=80, first_k_dense_replace=1, num_local_experts=8,
    num_experts_per_tok=2, moe_intermediate_size=40, shared_expert_intermediate_size=24, qk_norm="head",
    scoring_func="sigmoid",
)  # fmt: skip


def cases(world: int) -> dict[str, Plan]:
    """The plans for `world` ranks, by name."""
    everything: dict[str, Any] = {
        "context_parallel": 2, "expert_parallel": world, "vocab_parallel": world,
        "expert_chunk_tokens": 20, "max_expert_chunks": 3,
        "ffn_chunk_tokens": 16, "loss_chunk_tokens": 20, "optimizer_bucket_params": 5000,
        "optimizer_slots": 2,
    }  # fmt: skip
    fsdp: dict[str, Any] = {
        "context_parallel": 2,
        "expert_parallel": 2,
        "loss": "chunked",
        "loss_chunk_tokens": 20,
    }
    return {
        "mop": _plan(strategies.mop(world, **everything)),
        "mop_skewed": _plan(strategies.mop(world, **everything), "60/3"),
        "mop_zipf": _plan(strategies.mop(world, **everything), "zipf:1.2"),
        "mop_budget": _plan(strategies.mop(world, **everything, offload_inputs_bytes=40000), "95/4"),
        "mop_replicas": _plan(
            strategies.mop(
                world, **{**everything, "expert_parallel": 2, "vocab_parallel": 2}, optimizer_overlap=True
            )
        ),
        "mop_host_update": _plan(strategies.mop(world, **everything, optimizer="host")),
        "mop_microbatches": _plan(
            strategies.mop(world, **{**everything, "optimizer": "device"}), batch=world
        ),
        "zero_offload": _plan(strategies.zero_offload(world, expert_parallel=2)),
        "split": _plan(
            msgspec.structs.replace(
                strategies.megatron(world, tensor_parallel=2, expert_parallel=2, recompute="full"),
                stack="mopexec-split",
            )
        ),
        "fsdp2": _plan(strategies.fsdp2(world, **fsdp)),
        "fsdp2_skewed": _plan(strategies.fsdp2(world, **fsdp), "60/3"),
        "fsdp2_offload": _plan(strategies.fsdp2(world, **fsdp, offload=True, prefetch=2)),
        "fsdp2_keep": _plan(
            strategies.fsdp2(world, recompute="none", reshard_after_forward=False), batch=2 * world
        ),
        "fsdp2_boundaries": _plan(_changed(strategies.fsdp2(world), "activations", layer_inputs="host")),
    }


def trained(world: int) -> dict[str, Plan]:
    """The plans that are trained for real: on four ranks those where more than two do something else."""
    wide = ("mop", "mop_skewed", "mop_replicas", "zero_offload", "split", "fsdp2", "fsdp2_offload")
    found = {name: plan for name, plan in cases(world).items() if world == 2 or name in wide}
    moved = strategies.mop(world, expert_parallel=world, vocab_parallel=world, expert_chunk_tokens=20)
    moved = _changed(moved, "experts", balance="least_loaded", min_rows=16)
    return found | {"mop_moved_experts": _plan(moved, "95/4")}  # ranks hold different experts


def _plan(strategy: Strategy, routing: str = "balanced", batch: int = 0) -> Plan:
    ranks, strategy = strategy.world_size, load_stack(strategy.stack).resolve(strategy)
    smallest = strategy.data_groups * strategy.micro_batch
    return Plan(
        model=MODEL,
        hardware=HardwareRef(
            name="test", digest="0", num_nodes=1, devices_per_node=ranks, memory_limit=2**40, host_limit=2**40
        ),
        strategy=strategy,
        stack=load_stack(strategy.stack).on_kind("cpu"),
        training=TrainSpec(seq_len=SEQ, global_batch=batch or smallest, routing=routing),
    )


def _changed(strategy: Strategy, part: str, **fields: Any) -> Strategy:
    plain = io.to_plain(strategy)
    plain[part].update(fields)
    return io.convert(plain, Strategy, "strategy")
