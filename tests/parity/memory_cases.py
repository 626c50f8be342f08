"""Plans whose memory is compared between a dry run and real gloo training: every mechanism on, small."""

from typing import Any

from msgspec.structs import replace

from mopsim import strategies
from mopsim.spec.categories import KEPT
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import Plan
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from tests.plans import changed, plan_of, split

SEQ, SHORT = 256, 96
"""Tokens of a sequence, and of one that is trained for real, round which every loop goes more than once."""
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
        "mop": plan(strategies.mop(world, **everything)),
        "mop_skewed": plan(strategies.mop(world, **everything), "60/3"),
        "mop_zipf": plan(strategies.mop(world, **everything), "zipf:1.2"),
        "mop_budget": plan(strategies.mop(world, **everything, offload_inputs_bytes=40000), "95/4"),
        "mop_replicas": plan(
            strategies.mop(
                world, **{**everything, "expert_parallel": 2, "vocab_parallel": 2}, optimizer_overlap=True
            )
        ),
        "mop_early": plan(strategies.mop(world, **everything, optimizer_overlap="backward"), batch=world),
        "mop_early_here": plan(
            strategies.mop(
                world,
                **{**everything, "expert_parallel": 2, "optimizer": "device"},
                optimizer_overlap="backward",
            ),
            batch=2 * world,
        ),
        "mop_mtp": plan(
            strategies.mop(world, **everything), "60/3", model=replace(MODEL, num_nextn_predict_layers=2)
        ),
        "mop_one_weight": plan(
            strategies.mop(world, **everything),
            model=replace(MODEL, tie_word_embeddings=True, learned_positions=SEQ),
        ),
        "mop_nested": plan(nested(strategies.mop(world, **everything)), "60/3"),
        "mop_host_update": plan(strategies.mop(world, **everything, optimizer="host")),
        "mop_microbatches": plan(strategies.mop(world, **{**everything, "optimizer": "device"}), batch=world),
        "zero_offload": plan(strategies.zero_offload(world, expert_parallel=2)),
        "split": plan(split(world, tensor_parallel=2, expert_parallel=2, recompute="full")),
        "fsdp2": plan(strategies.fsdp2(world, **fsdp)),
        "fsdp2_skewed": plan(strategies.fsdp2(world, **fsdp), "60/3"),
        "fsdp2_tensors": plan(strategies.fsdp2(world, tensor_parallel=2, expert_parallel=2)),
        "fsdp2_offload": plan(strategies.fsdp2(world, **fsdp, offload=True, prefetch=2)),
        "fsdp2_keep": plan(
            strategies.fsdp2(world, recompute="none", reshard_after_forward=False), batch=2 * world
        ),
        "fsdp2_kept": plan(changed(strategies.fsdp2(world, **fsdp), activations={"save_ops": KEPT})),
        "fsdp2_boundaries": plan(changed(strategies.fsdp2(world), activations={"layer_inputs": "host"})),
    }


def nested(strategy: Strategy) -> Strategy:
    """The same with checkpoints of chunks in those of layers."""
    return replace(strategy, stack="mopexec-flat-nested")


WIDE = (
    "mop", "mop_skewed", "mop_nested", "mop_replicas", "mop_early_here", "zero_offload", "split", "fsdp2",
    "fsdp2_offload",
)  # fmt: skip
"""The cases in which more than two ranks do something else."""


def compared(world: int) -> dict[str, Plan]:
    """The cases that are compared on `world` ranks: those of WIDE on four, the others on two."""
    return {name: plan for name, plan in cases(world).items() if (name in WIDE) == (world == 4)}


def trained(world: int) -> dict[str, Plan]:
    """The plans that are trained for real, shortened; where experts are moved ranks hold different ones."""
    moved = strategies.mop(world, expert_parallel=world, vocab_parallel=world, expert_chunk_tokens=20)
    moved = changed(moved, experts={"balance": "least_loaded", "min_rows": 16})
    plans = compared(world) | ({"mop_moved_experts": plan(moved, "95/4")} if world == 4 else {})
    return {name: shortened(one) for name, one in plans.items()}


def shortened(one: Plan) -> Plan:
    """The plan on a short sequence and without the last layer; a budget holds as many layer inputs."""
    model = replace(one.model, num_hidden_layers=one.model.num_hidden_layers - 1)
    budget = one.strategy.activations.host_budget * SHORT // SEQ
    strategy = changed(one.strategy, activations={"host_budget": budget})
    return replace(one, model=model, strategy=strategy, training=replace(one.training, seq_len=SHORT))


def plan(strategy: Strategy, routing: str = "balanced", batch: int = 0, model: ModelSpec = MODEL) -> Plan:
    """A plan on CPUs."""
    smallest = strategy.data_groups * strategy.micro_batch
    clip = float(strategy.optimizer.overlap != "backward")
    training = TrainSpec(seq_len=SEQ, global_batch=batch or smallest, routing=routing, clip_norm=clip)
    return plan_of(model, strategy, training, "cpu")
