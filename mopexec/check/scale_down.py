"""A plan made small for this machine with every mechanism still at work: the same switches on tiny shapes."""

from itertools import groupby
from typing import Any

from msgspec.structs import replace

from mopsim.spec import layout
from mopsim.spec.layer_fields import dense_fields
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import HardwareRef, Plan
from mopsim.spec.strategy import Precision, Strategy

_HIDDEN, _HEADS, _HEAD_DIM, _INNER, _EXPERTS = 32, 4, 8, 24, 8
_LATENT_DIM, _WINDOW, _LIMIT = 12, 5, 0.01  # a window shorter than a sequence, a limit that clamps
_LATENT = {
    "q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6
}  # fmt: skip
_POSITIONS = 64  # of the longest sequence
_FLOOR = 3  # positions of one scale of queries
_EXCHANGES = {"ulysses": "Ulysses", "ring": "ring attention", "all_gather": "keys and values gathered"}
_CLIP_NORM = 0.05  # far below the norm of the first gradients, so that clipping is at work


def scale_down(plan: Plan, max_ranks: int = 4) -> Plan:
    """`plan` on at most 4 (and `max_ranks`) ranks in float64: degrees of 1 stay 1, those of all ranks stay
    all.

    Where the ranks allow it, degrees in between stay in between. Chunks, buckets, microbatches, tiers,
    recompute, ring direction, the model's switches and its kinds of layer are kept; clipping, where there is
    any, is made active.
    """
    ranks = _ranks(plan.strategy, max_ranks)
    strategy = _degrees(plan.strategy, ranks)
    virtual = strategy.pipeline.virtual_stages > 1
    microbatches = 2 if virtual else min(plan.training.num_microbatches(plan.strategy), 2)
    training = replace(
        plan.training.at_length(16 * ranks),
        routing=_routing(plan),
        clip_norm=_CLIP_NORM if plan.training.clip_norm else 0.0,
        warmup_steps=0,
        global_batch=strategy.micro_batch * strategy.data_groups * microbatches,
    )
    num_tokens = training.tokens_per_rank(strategy)
    strategy = _schedule(strategy, num_tokens)
    model = _model(plan.model, _vocabulary(plan, strategy, num_tokens), strategy)
    hardware = HardwareRef(
        name="this machine",
        digest="",
        num_nodes=1,
        devices_per_node=ranks,
        memory_limit=1 << 40,
        host_limit=1 << 40,
        architecture=plan.hardware.architecture,
    )
    return Plan(model=model, hardware=hardware, strategy=strategy, training=training, stack=plan.stack)


def _routing(plan: Plan) -> str:
    """The same profile for the experts of the small model; a measured one becomes a skew of its own."""
    routing = plan.training.routing
    if not plan.model.num_moe_layers:
        return "balanced"
    if not isinstance(routing, str):
        return "zipf:1"
    percent, _, hot = routing.partition("/")
    return f"{percent}/{min(int(hot), _EXPERTS)}" if hot else routing


def mechanisms(plan: Plan) -> list[str]:
    """What of the plan is at work, for people."""
    s, t, m = plan.strategy, plan.training, plan.model
    routed, again = m.num_moe_layers > 0, s.activations.recompute != "none"
    exchange = _EXCHANGES.get(s.attention.cp_comm_type, s.attention.cp_comm_type)
    found = {
        f"runtime {plan.stack.runtime or 'none'}": True,
        "embedding and head that share a weight": m.tie_word_embeddings,
        "latent attention": m.attention == "mla",
        "sliding windows": m.sliding_window > 0,
        "attention within chunks": m.attention_chunk_size > 0,
        "layers without rotary positions": not m.full_attention_rotary,
        "norms of queries and keys without weights": m.qk_norm == "unweighted",
        "queries scaled by their position": m.attn_temperature_tuning,
        "weighted inputs of experts": routed and m.expert_inputs_weighted,
        "dense layers between MoE layers": len(m.mlp_only_layers) > 0,
        "attention sinks": m.attention_sinks,
        "LayerNorm": m.norm == "layernorm",
        "feed-forwards without a gate": m.ffn_matrices == 2,
        "learned positions": m.learned_positions > 0,
        f"rotary positions scaled by {m.rope_scaling.rope_type}": m.rope_scaling.rope_type != "default",
        "rotary positions of part of a head": m.partial_rotary_factor < 1.0,
        "clamped SwiGLU": m.swiglu_limit > 0,
        f"experts of {m.topk_group} of {m.n_group} groups": m.topk_group < m.n_group,
        "routers' balance loss": routed and t.router_aux_loss_coef > 0,
        "routers' z-loss": routed and t.router_z_loss_coef > 0,
        "documents trained apart": t.attention_mask == "document",
        f"MTP modules ({m.num_nextn_predict_layers})": m.num_nextn_predict_layers > 0 and t.mtp_loss_coef > 0,
        f"dense state sharded over {s.dense.fsdp}": s.dense.fsdp > 1,
        "gathered parameters kept for the backward": s.dense.fsdp > 1 and not s.dense.reshard_after_forward,
        f"dense FFN in slices of {s.dense.chunk_tokens} tokens": s.dense.chunk_tokens > 0,
        f"tensors and rows split over {s.dense.tensor_parallel}": s.dense.tensor_parallel > 1,
        f"experts split over {s.experts.expert_tensor_parallel}": s.experts.expert_tensor_parallel > 1,
        f"{s.pipeline.pipeline_parallel} x {s.pipeline.virtual_stages} stages, {s.pipeline.schedule}": (
            s.pipeline.pipeline_parallel > 1
        ),
        f"{exchange} over {s.attention.context_parallel}": s.attention.context_parallel > 1,
        f"experts over {s.experts.expert_parallel}": s.experts.expert_parallel > 1,
        f"expert state sharded over {s.experts.expert_fsdp}": s.experts.expert_fsdp > 1,
        f"expert dispatch in chunks of {s.experts.chunk_tokens} tokens": s.experts.chunk_tokens > 0,
        "work of overloaded ranks moved to the least loaded": s.experts.balance == "least_loaded",
        f"vocabulary ring over {s.vocabulary.vocab_parallel}": s.vocabulary.loss == "ring",
        f"vocabulary split over {s.vocabulary.vocab_parallel}": s.vocabulary.loss == "vocab_parallel",
        f"loss in chunks of {s.vocabulary.chunk_tokens} tokens": s.vocabulary.chunk_tokens > 0,
        "decoder layers compiled": s.compile == "block",
        f"recompute {s.activations.recompute}": again,
        "nested checkpoints of expert chunks": (
            routed and again and plan.stack.recompute.chunk_inputs == "nested"
        ),
        f"kept for it: {', '.join(s.activations.save_ops)}": len(s.activations.save_ops) > 0,
        "boundaries on the host": s.activations.layer_inputs == "host",
        f"optimizer state on the host, updated on the {s.optimizer.update_on}": s.optimizer.state_tier
        == "host",
        f"{t.num_microbatches(s)} microbatches": t.num_microbatches(s) > 1,
        f"update beside the {s.optimizer.overlap.replace('_', ' ')}": s.optimizer.overlap != "none",
        "gradient clipping": t.clip_norm > 0,
    }
    return [name for name, at_work in found.items() if at_work]


def _ranks(strategy: Strategy, max_ranks: int) -> int:
    """1, 2, or 4 where a degree lies between one and all ranks."""
    degrees = (
        strategy.dense.fsdp,
        strategy.dense.tensor_parallel,
        strategy.pipeline.pipeline_parallel,
        strategy.experts.expert_tensor_parallel,
        strategy.attention.context_parallel,
        strategy.experts.expert_parallel,
        strategy.vocabulary.vocab_parallel,
        strategy.experts.expert_fsdp,
    )
    between = any(1 < degree < strategy.world_size for degree in degrees)
    wanted = min(strategy.world_size, 4 if between else 2, max_ranks)
    return 4 if wanted == 4 else 2 if wanted >= 2 else 1


def _degrees(strategy: Strategy, ranks: int) -> Strategy:
    stages, world = min(strategy.pipeline.pipeline_parallel, 2), ranks
    ranks //= stages

    def scaled(degree: int) -> int:
        return 1 if degree == 1 else ranks if degree == strategy.stage_ranks else min(2, ranks)

    vocabulary = scaled(strategy.vocabulary.vocab_parallel)
    tensor, split = scaled(strategy.dense.tensor_parallel), scaled(strategy.experts.expert_tensor_parallel)
    experts = min(scaled(strategy.experts.expert_parallel), ranks // split)
    holders, dense = ranks // tensor, strategy.dense.fsdp
    every = dense == strategy.dense_replicas
    replicas, shard = ranks // (experts * split), strategy.experts.expert_fsdp
    if shard == strategy.expert_replicas:
        shard = replicas
    else:
        shard = 1 if shard == 1 or replicas < 4 else 2
    return replace(
        strategy,
        world_size=world,
        micro_batch=min(strategy.micro_batch, 2),
        pipeline=replace(
            strategy.pipeline,
            pipeline_parallel=stages,
            virtual_stages=min(strategy.pipeline.virtual_stages, 2),
            layers=(),
        ),
        dense=replace(
            strategy.dense, tensor_parallel=tensor, fsdp=holders if every else min(scaled(dense), holders)
        ),
        attention=replace(
            strategy.attention, context_parallel=min(scaled(strategy.attention.context_parallel), holders)
        ),
        experts=replace(
            strategy.experts, expert_parallel=experts, expert_tensor_parallel=split, expert_fsdp=shard
        ),
        vocabulary=replace(
            strategy.vocabulary,
            vocab_parallel=tensor if strategy.vocabulary.loss == "vocab_parallel" else vocabulary,
        ),
        precision=_float64(strategy.precision),
    )


def _float64(precision: Precision) -> Precision:
    """Exact enough to tell a wrong step from rounding."""
    return Precision(
        compute="float64",
        param="float64",
        reduce="float64",
        grad="float64",
        moments="float64",
        master="param" if precision.master == "param" else "float64",
    )


def _schedule(strategy: Strategy, num_tokens: int) -> Strategy:
    """Chunks that do not divide the tokens, buckets that cut across units, a host budget for half the
    layers."""
    sliced = (strategy.dense, strategy.experts, strategy.vocabulary)
    dense, experts, vocabulary = (
        replace(one, chunk_tokens=max(1, num_tokens // 3) if one.chunk_tokens else 0) for one in sliced
    )
    budget = num_tokens * _HIDDEN * 8 if strategy.activations.host_budget else 0
    return replace(
        strategy,
        dense=dense,
        experts=experts,
        vocabulary=vocabulary,
        optimizer=replace(strategy.optimizer, bucket_params=1000),
        activations=replace(strategy.activations, host_budget=budget),
    )


def _vocabulary(plan: Plan, strategy: Strategy, num_tokens: int) -> int:
    """Rows so that the ring moves what it moves at full scale; not a multiple of its degree."""
    at_scale = plan.training.tokens_per_rank(plan.strategy)
    full = plan.strategy.vocabulary
    weights_move = layout.ring_moves_weights(at_scale, plan.model.vocab_size, full.vocab_parallel)
    rows = num_tokens // 2 if weights_move else num_tokens * 2
    return max(strategy.vocabulary.vocab_parallel * rows + 1, 17)


def _model(model: ModelSpec, vocab_size: int, strategy: Strategy) -> ModelSpec:
    moe = model.num_moe_layers > 0
    heads, kv, latent = model.num_attention_heads, model.num_key_value_heads, model.attention == "mla"
    sizes: dict[str, int] = {name: size for name, size in _LATENT.items() if latent and getattr(model, name)}
    if model.topk_method != "greedy":
        sizes |= {"n_group": min(model.n_group, 4), "topk_group": min(model.topk_group, 2)}
    return replace(
        model,
        hidden_size=_HIDDEN,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS
        if kv == heads or latent
        else max(min(kv, 2), strategy.dense.tensor_parallel),
        head_dim=_LATENT_DIM if latent else _HEAD_DIM,
        partial_rotary_factor=_part(model.partial_rotary_factor),
        swiglu_limit=_LIMIT if model.swiglu_limit else 0.0,
        floor_scale=_FLOOR if model.attn_temperature_tuning else model.floor_scale,
        learned_positions=min(model.learned_positions, _POSITIONS),
        num_nextn_predict_layers=min(model.num_nextn_predict_layers, 2),
        vocab_size=vocab_size,
        intermediate_size=2 * _INNER if model.intermediate_size else 0,
        num_local_experts=_EXPERTS if moe else 0,
        num_experts_per_tok=min(model.num_experts_per_tok, 4) if moe else 0,
        moe_intermediate_size=_INNER if moe else 0,
        shared_expert_intermediate_size=_INNER if model.shared_expert_intermediate_size else 0,
        total_params=None,
        active_params=None,
        **sizes,
        **_layers(model, strategy.pipeline.pipeline_parallel * strategy.pipeline.virtual_stages),
    )


def _part(part: float) -> float:
    """The part of a small head nearest to one so large that turns pairs, but not all of them."""
    return min(max(2 * round(_HEAD_DIM * part / 2), 2), _HEAD_DIM - 2) / _HEAD_DIM if part < 1 else 1.0


def _layers(model: ModelSpec, parts: int) -> dict[str, Any]:
    """Of each run of equal layers one, from the first on, until every kind is there; more where the stages
    need them."""
    runs = [kind for kind, _ in groupby(map(model.layer_kind, range(model.num_hidden_layers)))]
    every = max(runs.index(kind) + 1 for kind in runs)
    mixed = 0 < model.num_moe_layers < model.num_hidden_layers
    count = max(3 if mixed else 2, every, parts)
    layers = (runs + runs[-1:] * count)[:count]
    dense = [place for place, kind in enumerate(layers) if not kind.routed] if model.num_moe_layers else []
    windows = model.windowed_at([kind.window > 0 for kind in layers], _WINDOW)
    return {"num_hidden_layers": count} | dense_fields(dense, count) | windows
