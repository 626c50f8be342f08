"""The capability table: a row for every field of Strategy, ModelSpec, TrainSpec and Stack.

A row says which values the simulator plays, each runtime of mopexec runs and each export target can say; a
side that a row does not name takes every value. Relations between fields are in `rules`.
"""

from mopsim.spec.capability.facts import (
    ALL,
    LABEL,
    Cell,
    Row,
    balanced_experts,
    boundaries_on_host,
    capped_chunks,
    chunked_experts,
    context_groups,
    context_parallel,
    elsewhere,
    expert_groups,
    expert_parallel,
    gathers_layers,
    gqa,
    has_dense,
    has_experts,
    in_8_bits,
    logits_in_rows,
    mla,
    only,
    pipelined,
    predicts_further,
    row,
    scheduled,
    selective,
    slices,
    split_vocabulary,
    state_on_host,
    streamed,
    tensor_parallel,
    vocabulary_rings,
    whole_steps,
    windowed,
    zero_3,
)
from mopsim.spec.rope import RopeScaling

_WIDE = ("float64", "float32", "bfloat16")
_SCALED = "mopexec does not scale the loss, as float16 needs"
_SHORT = ("float32", "bfloat16", "float16")
"""DeepSpeed's fp32, bf16 and fp16."""
_PROGRAM = elsewhere("a target is a program of its own")
_NUMBERS = elsewhere("it changes numbers, not work")
_NETWORK = elsewhere("the network is a recipe's, a flavor's or a Hugging Face config's")
_NAMED = row(simulator=LABEL, mopexec=LABEL, exports=LABEL)
_TITAN_MODELS = ("deepseek_v3", "qwen3_30b_a3b", "qwen3_235b_a22b", "gpt_oss_20b", "gpt_oss_120b")
_UNSET = "not a setting there"

STRATEGY: dict[str, Row] = {
    "name": _NAMED,
    "world_size": row(
        megatron_bridge=elsewhere("the launcher's"),
        deepspeed=elsewhere("the launcher's"),
    ),
    "micro_batch": row(),
    "stack": row(exports=_PROGRAM),
    "pipeline.pipeline_parallel": row(
        mopexec=only(1), split_modules=ALL, deepspeed=only(1, why="it is code there, not configuration")
    ),
    "pipeline.virtual_stages": row(pipelined),
    "pipeline.layers": row(pipelined, torchtitan=only((), why="its stages are cut by a number of layers")),
    "pipeline.schedule": row(
        scheduled, split_modules=only("1f1b", "interleaved"), megatron_bridge=only("1f1b", "interleaved")
    ),
    "dense.tensor_parallel": row(mopexec=only(1), split_modules=ALL),
    "dense.sequence_parallel": row(
        tensor_parallel,
        split_modules=only(True),
        torchtitan=only(True, why="tensor parallelism always splits rows"),
        deepspeed=only(False, why="AutoTP sums by all-reduce"),
    ),
    "dense.fsdp": row(),
    "dense.zero": row(
        flat_units=only(3),
        fully_shard=only(2, 3),
        split_modules=only(1),
        torchtitan=only(3, why="fully_shard shards everything"),
    ),
    "dense.reshard_after_forward": row(
        zero_3,
        flat_units=only(True),
        megatron_bridge=only(True, why=_UNSET),
        deepspeed=only(True, why=_UNSET),
    ),
    "dense.prefetch": row(gathers_layers, exports=only(1, why=_UNSET)),
    "dense.param_tier": row(
        flat_units=only("device"), split_modules=only("device"), megatron_bridge=only("device")
    ),
    "dense.grad_tier": row(
        flat_units=only("device"),
        split_modules=only("device"),
        megatron_bridge=only("device"),
        deepspeed=elsewhere("gradients go where offload_optimizer is"),
    ),
    "dense.chunk_tokens": row(
        slices, fully_shard=only(0), split_modules=only(0), exports=only(0, why=_UNSET)
    ),
    "attention.context_parallel": row(),
    "attention.cp_comm_type": row(
        context_parallel,
        mopexec=only("ulysses"),
        split_modules=ALL,
        torchtitan=only("all_gather", "ring", why="it gathers keys and values, or rotates them"),
        deepspeed=only("ulysses"),
    ),
    "attention.rank_placement": row(
        context_groups, exports=only("contiguous", why="its groups are contiguous")
    ),
    "experts.expert_parallel": row(has_experts),
    "experts.expert_tensor_parallel": row(has_experts, mopexec=only(1), split_modules=ALL, deepspeed=only(1)),
    "experts.expert_fsdp": row(has_experts),
    "experts.chunk_tokens": row(
        chunked_experts,
        fully_shard=only(0),
        split_modules=only(0),
        exports=only(0, why="it has one dispatch a layer"),
    ),
    "experts.max_chunks": row(capped_chunks),
    "experts.balance": row(expert_parallel, mopexec=only("none"), flat_units=ALL, exports=only("none")),
    "experts.capacity": row(balanced_experts),
    "experts.min_rows": row(balanced_experts),
    "experts.threshold": row(balanced_experts),
    "experts.token_dispatcher": row(expert_parallel, mopexec=only("alltoall"), deepspeed=only("alltoall")),
    "experts.rank_placement": row(expert_groups, exports=only("contiguous", why="its groups are contiguous")),
    "experts.param_tier": row(
        has_experts, flat_units=only("device"), split_modules=only("device"), megatron_bridge=only("device")
    ),
    "experts.grad_tier": row(
        has_experts,
        flat_units=only("device"),
        split_modules=only("device"),
        megatron_bridge=only("device"),
        deepspeed=elsewhere("gradients go where offload_optimizer is"),
    ),
    "vocabulary.vocab_parallel": row(split_vocabulary, fully_shard=only(1)),
    "vocabulary.loss": row(
        flat_units=only("full", "chunked", "ring"),
        fully_shard=only("full", "chunked"),
        split_modules=only("full", "chunked", "vocab_parallel"),
        torchtitan=only("full", "vocab_parallel"),
        megatron_bridge=only("full", "vocab_parallel"),
        deepspeed=only("full"),
    ),
    "vocabulary.chunk_tokens": row(logits_in_rows),
    "vocabulary.rank_placement": row(vocabulary_rings, exports=only("contiguous")),
    "optimizer.state_tier": row(),
    "optimizer.update_on": row(
        state_on_host, exports=only("host", why="it does not stream the state through the device")
    ),
    "optimizer.bucket_params": row(streamed),
    "optimizer.slots": row(streamed),
    "optimizer.host_fraction": row(
        state_on_host,
        mopexec=only(1.0, why="all of the state is on the host, or none"),
        torchtitan=only(1.0, why="it offloads all or nothing"),
    ),
    "optimizer.overlap": row(
        streamed,
        fully_shard=only("none"),
        split_modules=only("none"),
        exports=only("none", why="its update ends with the step"),
    ),
    "activations.recompute": row(
        flat_units=only("full"),
        fully_shard=only("none", "full"),
        torchtitan=only("none", "full", why="its selective mode names operators, not modules"),
        deepspeed=only("none", "full"),
    ),
    "activations.modules": row(selective),
    "activations.save_ops": row(mopexec=only(()), exports=only(())),
    "activations.layer_inputs": row(torchtitan=only("device")),
    "activations.host_budget": row(
        boundaries_on_host, megatron_bridge=only(0, why=_UNSET), deepspeed=only(0, why=_UNSET)
    ),
    "activations.cpu_offload_layers": row(mopexec=only(0), exports=only(0)),
    "overlap.grad_reduce": row(whole_steps, mopexec=only(False), torchtitan=only(False)),
    "overlap.param_gather": row(
        whole_steps, mopexec=only(False), torchtitan=only(False), deepspeed=only(False, why=_UNSET)
    ),
    "overlap.pipeline": row(pipelined, mopexec=only(False), torchtitan=only(False, why=_UNSET)),
    "overlap.tensor": row(
        tensor_parallel,
        mopexec=only(False),
        torchtitan=only(False, why="asynchronous tensor parallelism needs torch.compile there"),
        deepspeed=only(False, why=_UNSET),
    ),
    "overlap.experts": row(expert_parallel, mopexec=only(False), exports=only(False)),
    "precision.compute": row(
        mopexec=only(*_WIDE, why=_SCALED),
        torchtitan=only("bfloat16", "float32"),
        megatron_bridge=only("bfloat16", why="of its recipes those in bf16 are written"),
        deepspeed=only(*_SHORT),
    ),
    "precision.param": row(
        mopexec=only(*_WIDE),
        torchtitan=only("float32", why="shards are the masters, in fp32"),
        megatron_bridge=only("bfloat16", why="weights are bf16"),
        deepspeed=only(*_SHORT),
    ),
    "precision.reduce": row(
        mopexec=only(*_WIDE, why=_SCALED),
        torchtitan=only("float32", why="it reduces in fp32"),
        megatron_bridge=only("float32", "bfloat16"),
        deepspeed=only(*_SHORT),
    ),
    "precision.grad": row(
        mopexec=only(*_WIDE, why=_SCALED),
        torchtitan=only("float32", why="gradients have the dtype of the shards"),
        megatron_bridge=only("float32", "bfloat16"),
        deepspeed=only(*_SHORT),
    ),
    "precision.moments": row(mopexec=only(*_WIDE), exports=only("float32")),
    "precision.master": row(
        torchtitan=only("param", why="parameters are the masters"),
        megatron_bridge=only("float32", why="masters are fp32"),
        deepspeed=only("float32", "param"),
    ),
    "precision.matmul": row(
        megatron_bridge=only("compute", "bfloat16", "fp8", "mxfp8", "nvfp4"),
    ),
    "precision.attention": row(in_8_bits, mopexec=only("compute"), exports=only("compute")),
    "precision.vocabulary": row(in_8_bits, mopexec=only("compute"), exports=only("compute")),
}

_SIZE = row(exports=_NETWORK)
_ROUTED = row(has_experts, exports=_NETWORK)
_LOW_RANK = row(mla, exports=_NETWORK)
_ROUTER = row(has_experts, simulator=_NUMBERS, exports=_NETWORK)
_STATED = "a published figure, to be checked against"

MODEL: dict[str, Row] = {
    "name": row(
        simulator=LABEL,
        mopexec=LABEL,
        torchtitan=only(*_TITAN_MODELS, why="those that it has a flavor of"),
        megatron_bridge=_NETWORK,
        deepspeed=_NETWORK,
    ),
    "hidden_size": _SIZE,
    "num_hidden_layers": _SIZE,
    "num_attention_heads": _SIZE,
    "num_key_value_heads": row(gqa, exports=_NETWORK),
    "head_dim": _SIZE,
    "vocab_size": _SIZE,
    "intermediate_size": row(has_dense, exports=_NETWORK),
    "first_k_dense_replace": _ROUTED,
    "num_local_experts": _SIZE,
    "num_experts_per_tok": _ROUTED,
    "moe_intermediate_size": _ROUTED,
    "shared_expert_intermediate_size": _ROUTED,
    "shared_expert_gate": row(has_experts, exports=_NETWORK),
    "tie_word_embeddings": row(flat_units=only(False), exports=_NETWORK),
    "attention": row(exports=_NETWORK),
    "q_lora_rank": _LOW_RANK,
    "kv_lora_rank": _LOW_RANK,
    "qk_nope_head_dim": _LOW_RANK,
    "qk_rope_head_dim": _LOW_RANK,
    "v_head_dim": _LOW_RANK,
    "attention_bias": row(exports=_NETWORK),
    "attention_sinks": row(exports=_NETWORK),
    "qk_norm": row(exports=_NETWORK),
    "sliding_window": row(exports=_NETWORK),
    "sliding_window_period": row(windowed, exports=_NETWORK),
    "expert_bias": row(has_experts, exports=_NETWORK),
    "router_bias": row(has_experts, exports=_NETWORK),
    "ffn_matrices": row(mopexec=only(3), exports=_NETWORK),
    "ffn_bias": row(has_dense, flat_units=only(False), exports=_NETWORK),
    "norm": row(mopexec=only("rmsnorm"), exports=_NETWORK),
    "learned_positions": row(mopexec=only(0), exports=_NETWORK),
    "num_nextn_predict_layers": row(flat_units=only(0), exports=_NETWORK),
    "scoring_func": _ROUTER,
    "norm_topk_prob": _ROUTER,
    "dropout": row(mopexec=only(0.0), exports=only(0.0, why="it is not written")),
    "routed_scaling_factor": _ROUTER,
    "topk_method": _ROUTER,
    "n_group": _ROUTER,
    "topk_group": _ROUTER,
    "swiglu_limit": row(has_experts, simulator=_NUMBERS, exports=_NETWORK),
    "swiglu_alpha": row(has_experts, simulator=_NUMBERS, exports=_NETWORK),
    "rms_norm_eps": row(simulator=_NUMBERS, exports=_NETWORK),
    "rope_theta": row(simulator=_NUMBERS, exports=_NETWORK),
    "rope_interleave": row(simulator=_NUMBERS, exports=_NETWORK),
    **{
        f"rope_scaling.{field}": row(simulator=_NUMBERS, exports=_NETWORK)
        for field in RopeScaling.__struct_fields__
    },
    "total_params": row(simulator=elsewhere(_STATED), mopexec=elsewhere(_STATED), exports=_NETWORK),
    "active_params": row(simulator=elsewhere(_STATED), mopexec=elsewhere(_STATED), exports=_NETWORK),
    "source": _NAMED,
    "assumptions": _NAMED,
}

_HYPER = row(simulator=_NUMBERS)

TRAINING: dict[str, Row] = {
    "seq_len": row(deepspeed=elsewhere("the data loader's")),
    "global_batch": row(),
    "routing": row(has_experts, exports=elsewhere("the router decides")),
    "learning_rate": _HYPER,
    "warmup_steps": _HYPER,
    "beta1": _HYPER,
    "beta2": _HYPER,
    "eps": _HYPER,
    "weight_decay": _HYPER,
    "clip_norm": _HYPER,
    "bias_update_rate": row(
        has_experts, simulator=_NUMBERS, exports=only(1e-3, why="router biases are set in model code")
    ),
    **dict.fromkeys(
        ("router_aux_loss_coef", "router_z_loss_coef"),
        row(
            has_experts, simulator=_NUMBERS, flat_units=only(0.0), exports=only(0.0, why="it is not written")
        ),
    ),
    "mtp_loss_coef": row(predicts_further, simulator=_NUMBERS, exports=only(0.3, why="it is not written")),
    "attention_mask": row(
        simulator=elsewhere("a sequence is taken as one document, the most work"),
        exports=only("causal", why="it is not written"),
    ),
    "seed": row(simulator=_NUMBERS, deepspeed=only(0, why="the training script sets it")),
}

_KERNELS = (
    "norm",
    "rotary",
    "activation",
    "residual",
    "expert_rows",
    "expert_products",
    "gate_up",
    "weight_grads",
    "ring_blocks",
    "loss",
    "logits_held",
    "loss_chunks",
    "router",
    "sequence_exchange",
    "expert_outputs",
    "expert_bias",
    "clamped_gate",
    "row_sums",
    "attention",
    "deterministic",
    "fills",
)
_DTYPES = ("param", "reduce", "grad", "moments", "master")
_HIDES = ("grad_reduce", "param_gather", "pipeline", "tensor", "experts")
_OWN = (
    "explicit",
    *(f"kernels.{name}" for name in _KERNELS),
    "sharding.fsdp", "sharding.copies", "sharding.experts", "sharding.agreements", "sharding.groups",
    "recompute.stops_early", "recompute.holds_output", "recompute.inputs",
    "recompute.kept", "recompute.selective", "recompute.chunk_inputs",
    "host.modules", "host.graphs", "host.frames",
    *(f"dtypes.{name}" for name in _DTYPES),
    *(f"hides.{name}" for name in _HIDES),
    "communication_share",
)  # fmt: skip
"""What a program does anyway. A runtime of mopexec runs its own; a target is another program."""

PROGRAM = row(mopexec=Cell(why="as the stack says that describes the runtime"), exports=_PROGRAM)
"""The row of all that a program does anyway."""
_KIND = elsewhere("which kernels run where the devices are CPUs (`Stack.on_kind`)")
_READING = elsewhere("what a reported peak counts, which mopsim validate compares with")

STACK: dict[str, Row] = {
    "name": _NAMED,
    "version": _NAMED,
    "extends": _NAMED,
    "sources": _NAMED,
    "cpu": row(simulator=_KIND, mopexec=_KIND, exports=_PROGRAM),
    "runtime": row(
        simulator=LABEL,
        flat_units=only("flat_units"),
        fully_shard=only("fully_shard"),
        split_modules=only("split_modules"),
        exports=_PROGRAM,
    ),
    **dict.fromkeys(
        ("reading.memory", "reading.last_stage"),
        row(simulator=_READING, mopexec=_READING, exports=_PROGRAM),
    ),
    **dict.fromkeys(_OWN, PROGRAM),
}

ROWS: dict[str, Row] = {
    f"{noun}.{field}": found
    for noun, rows in (("model", MODEL), ("strategy", STRATEGY), ("training", TRAINING), ("stack", STACK))
    for field, found in rows.items()
}
"""By the field's path in a plan, in the order in which refusals are told."""
