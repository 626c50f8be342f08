"""Small plans of split_modules: each mechanism alone, and together, by world size."""

from functools import partial
from typing import Any

import msgspec

from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import Plan
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from tests import plans

MODEL = ModelSpec(
    name="tiny", hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, vocab_size=37, intermediate_size=22, first_k_dense_replace=1, num_local_experts=8,
    num_experts_per_tok=2, moe_intermediate_size=12, shared_expert_intermediate_size=6, qk_norm="head",
)  # fmt: skip
replace = msgspec.structs.replace
LATENT = replace(
    MODEL, attention="mla", num_key_value_heads=4, head_dim=12, q_lora_rank=10, kv_lora_rank=8,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, qk_norm="none", num_nextn_predict_layers=1,
)  # fmt: skip
BIASED = replace(
    MODEL, attention_bias="qkvo", attention_sinks=True, sliding_window=5, expert_bias=True, router_bias=True,
    shared_expert_intermediate_size=0, tie_word_embeddings=True, ffn_bias=True, qk_norm="none",
)  # fmt: skip
DENSE = replace(
    MODEL, num_local_experts=0, num_experts_per_tok=0, first_k_dense_replace=0, moe_intermediate_size=0,
    shared_expert_intermediate_size=0,
)  # fmt: skip
HALVES: dict[str, dict[str, Any]] = {"pipeline": {"schedule": "zero_bubble"}}


def plan_of(
    strategy: Strategy,
    model: ModelSpec = MODEL,
    *,
    changes: dict[str, dict[str, Any]] | None = None,
    **training: Any,
) -> Plan:
    """A plan for split_modules. changes: fields of a component of the strategy, by its name."""
    least = 3 if strategy.world_size == 2 else 2  # the first, on two ranks one between, the last
    microbatches = max(least, 2 * strategy.pipeline.pipeline_parallel)
    train = {
        "seq_len": 16, "global_batch": microbatches * strategy.data_groups * strategy.micro_batch,
        "clip_norm": 0.05, "weight_decay": 0.1, "learning_rate": 1e-2,
    }  # fmt: skip
    training = TrainSpec(**{**train, "routing": "balanced", **training})
    return plans.plan_of(model, plans.changed(strategy, **(changes or {})), training)


def _make(world: int, model: ModelSpec = MODEL, **options: Any) -> Plan:
    """A plan of `strategies.megatron`; training's fields among the options."""
    fields = (*TrainSpec.__struct_fields__, "changes")
    other = {name: options.pop(name) for name in fields if name in options}
    return plan_of(plans.split(world, **{"dtype": "float64", **options}), model, **other)


def two() -> dict[str, Plan]:
    """On two ranks, by name."""
    make = partial(_make, 2)
    return {
        "zero_1, replicated": make(
            expert_parallel=2, changes={"dense": {"fsdp": 1}, "experts": {"expert_fsdp": 1}}
        ),
        "float32": make(tensor_parallel=2, expert_parallel=2, dtype="float32"),
        "inputs on the host": make(tensor_parallel=2, micro_batch=2, recompute="full", offload_inputs=True),
        "state on the host": make(tensor_parallel=2, optimizer_on_host=1.0),
        "experts split": make(tensor_parallel=2, expert_tensor_parallel=2, recompute="selective"),
        "skewed": make(tensor_parallel=2, expert_parallel=2, routing="60/3"),
        "latent": make(
            LATENT, tensor_parallel=2, expert_parallel=2, router_aux_loss_coef=1e-2, router_z_loss_coef=1e-3
        ),
        "biased": make(
            BIASED, tensor_parallel=2, expert_parallel=2, changes={"precision": {"master": "param"}}
        ),
        "dense": make(
            DENSE, tensor_parallel=2, recompute="selective", recompute_modules=("core_attn", "mlp")
        ),
        "stages": make(pipeline_parallel=2),
        "stages in halves": make(pipeline_parallel=2, changes=HALVES),
        "stages in halves, latent": make(
            replace(LATENT, num_nextn_predict_layers=0), pipeline_parallel=2, changes=HALVES, recompute="full"
        ),
        "stages in turn": make(
            replace(MODEL, num_hidden_layers=5),
            pipeline_parallel=2,
            virtual_stages=2,
            recompute="full",
            offload_inputs=True,
        ),
    }


def four() -> dict[str, Plan]:
    """On four ranks, by name."""
    make = partial(_make, 4)
    return {
        "all, skewed": make(
            tensor_parallel=2, expert_parallel=2, expert_tensor_parallel=2, micro_batch=2, routing="95/4"
        ),
        "experts split and spread": make(tensor_parallel=2, expert_parallel=2, expert_tensor_parallel=2),
        "ulysses": make(
            LATENT, tensor_parallel=2, context_parallel=2, context_exchange="ulysses", expert_parallel=4
        ),
        "ring": make(context_parallel=4, expert_parallel=2, micro_batch=2),
        "blocks gathered": make(
            LATENT, context_parallel=2, context_exchange="all_gather", tensor_parallel=2, recompute="full"
        ),
        "four stages": make(
            replace(MODEL, num_hidden_layers=4, first_k_dense_replace=2),
            pipeline_parallel=4,
            stage_layers=(0, 2, 1, 1),
        ),
        "stages in halves, tensors": make(
            replace(BIASED, tie_word_embeddings=False),
            pipeline_parallel=2,
            tensor_parallel=2,
            expert_parallel=2,
            changes=HALVES,
        ),
        "replicated": make(tensor_parallel=2, changes={"dense": {"fsdp": 1}, "experts": {"expert_fsdp": 2}}),
    }


def eight() -> dict[str, Plan]:
    """On eight ranks, by name."""
    return {
        "stages": _make(
            8, pipeline_parallel=2, tensor_parallel=2, expert_parallel=2, expert_tensor_parallel=2,
            recompute="full",
        )
    }  # fmt: skip


def cases(world: int) -> dict[str, tuple[Plan, str]]:
    """(plan, who routes) by name."""
    found = {2: two, 4: four, 8: eight}[world]()
    return {name: (plan, "profile" if "skewed" in name else "learned") for name, plan in found.items()}
