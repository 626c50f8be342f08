"""Strategy families: functions that return a Strategy. Nothing anywhere branches on a name."""

from typing import Literal

from mopsim.spec.strategy import (
    Activations,
    Attention,
    Dense,
    DType,
    Exchange,
    Experts,
    Optimizer,
    Order,
    Overlap,
    Pipeline,
    Precision,
    Strategy,
    Tier,
    Vocabulary,
)

FAMILIES = ("mop", "fsdp2", "zero_offload", "megatron")
STACKS = {
    "mop": "mopexec-flat",
    "fsdp2": "mopexec-fsdp2",
    "zero_offload": "mopexec-flat",
    "megatron": "megatron-core",
}
"""The software that a family's strategies are meant for, where no other is given."""

AS_STACK = Overlap(grad_reduce=None, param_gather=None, pipeline=None, tensor=None, experts=None)
"""Communication is hidden as the software does it."""

State = Literal["device", "host_streamed", "host"]
"""Where the optimizer lives: on the device; on the host, streamed through the device; on the host,
updated there."""

Wide = Literal["float32", "float64"]


def _wide(precision: DType) -> Wide:
    """The dtype of master weights and moments: float64 only where everything is float64."""
    return "float64" if precision == "float64" else "float32"


def _low_precision(precision: DType, *, keep_master: bool) -> Precision:
    """Weights and gradients in `precision`; master and moments in fp32 (fp64 in float64)."""
    wide = _wide(precision)
    return Precision(
        compute=precision,
        param=precision,
        reduce=precision,
        grad=precision,
        moments=wide,
        master=wide if keep_master or precision != wide else "param",
    )


def _state(state: State, bucket_params: int = 100_000_000, slots: int = 2) -> Optimizer:
    tier: Tier = "device" if state == "device" else "host"
    side: Tier = "host" if state == "host" else "device"
    return Optimizer(state_tier=tier, update_on=side, bucket_params=bucket_params, slots=slots)


def mop(
    world_size: int,
    *,
    sequence: int = 1,
    experts: int = 1,
    vocabulary: int = 1,
    micro_batch: int = 1,
    dense_shard: int = 0,
    expert_shard: int = 0,
    chunk_tokens: int = 8192,
    max_chunks: int = 10,
    ffn_chunk_tokens: int = 0,
    loss_chunk_tokens: int = 0,
    state: State = "host_streamed",
    bucket_params: int = 100_000_000,
    slots: int = 2,
    boundary_tier: Tier = "host",
    host_budget: int = 0,
    prefetch: int = 1,
    order: Order = "contiguous",
    precision: DType = "bfloat16",
    name: str = "mop",
) -> Strategy:
    """Mixture-of-Parallelisms (arXiv 2607.01844): D = sequence, Ep = experts, P = vocabulary, each
    chosen alone.

    Dense weights ZeRO-3 over `dense_shard` ranks, experts chunked by `chunk_tokens` (c), ring
    vocabulary, fp32
    state on the host streamed in buckets of `bucket_params` (beta), full recompute, boundaries on the host.
    dense_shard and expert_shard 0 = as many ranks as there are. `order` places the expert groups.
    """
    return Strategy(
        name=name,
        world_size=world_size,
        micro_batch=micro_batch,
        stack=STACKS["mop"],
        dense=Dense(fsdp=dense_shard or world_size, prefetch=prefetch, chunk_tokens=ffn_chunk_tokens),
        attention=Attention(context_parallel=sequence),
        experts=Experts(
            expert_parallel=experts,
            expert_fsdp=expert_shard or max(1, world_size // experts),
            chunk_tokens=chunk_tokens,
            max_chunks=max_chunks,
            rank_placement=order,
        ),
        vocabulary=Vocabulary(vocab_parallel=vocabulary, loss="ring", chunk_tokens=loss_chunk_tokens),
        optimizer=_state(state, bucket_params, slots),
        activations=Activations(recompute="full", layer_inputs=boundary_tier, host_budget=host_budget),
        precision=_low_precision(precision, keep_master=state != "device"),
    )


def fsdp2(
    world_size: int,
    *,
    tensor: int = 1,
    sequence: int = 1,
    exchange: Exchange = "ulysses",
    experts: int = 1,
    micro_batch: int = 1,
    dense_shard: int = 0,
    recompute: Literal["none", "full"] = "full",
    loss: Literal["full", "chunked"] = "full",
    loss_chunk_tokens: int = 1024,
    offload: bool = False,
    reshard: bool = True,
    prefetch: int = 1,
    precision: DType = "bfloat16",
    name: str = "fsdp2",
) -> Strategy:
    """torch FSDP2 as its users tune it: fp32 sharded parameters (the master), compute in `precision`.

    Gradients are reduced in fp32. dense_shard below world_size is HSDP. offload: torch's CPUOffloadPolicy,
    which keeps parameters, gradients and optimizer on the host and updates them there. Experts by expert
    parallelism over `experts` ranks, sharded over their replicas. tensor above 1: tensor parallelism with
    sequence as TorchTitan does it, and its loss over the split vocabulary, whatever `loss` says.
    """
    wide = _wide(precision)
    tier: Tier = "host" if offload else "device"
    split = tensor > 1
    return Strategy(
        name=name,
        world_size=world_size,
        micro_batch=micro_batch,
        stack=STACKS["fsdp2"],
        dense=Dense(
            tensor_parallel=tensor,
            fsdp=dense_shard or max(1, world_size // tensor),
            reshard_after_forward=reshard,
            prefetch=prefetch,
            param_tier=tier,
            grad_tier=tier,
        ),
        attention=Attention(context_parallel=sequence, cp_comm_type=exchange),
        experts=Experts(
            expert_parallel=experts,
            expert_fsdp=max(1, world_size // experts),
            param_tier=tier,
            grad_tier=tier,
        ),
        vocabulary=Vocabulary(
            vocab_parallel=tensor,
            loss="vocab_parallel" if split else loss,
            chunk_tokens=loss_chunk_tokens if loss == "chunked" and not split else 0,
        ),
        optimizer=_state("host" if offload else "device"),
        activations=Activations(recompute=recompute),
        precision=Precision(
            compute=precision, param=wide, reduce=wide, grad=wide, moments=wide, master="param"
        ),
    )


def zero_offload(
    world_size: int,
    *,
    sequence: int = 1,
    experts: int = 1,
    micro_batch: int = 1,
    dense_shard: int = 0,
    expert_shard: int = 0,
    loss: Literal["full", "chunked"] = "full",
    loss_chunk_tokens: int = 1024,
    boundary_tier: Tier = "device",
    prefetch: int = 1,
    precision: DType = "bfloat16",
    name: str = "zero_offload",
) -> Strategy:
    """ZeRO-Offload (arXiv 2101.06840) on ZeRO-3: weights and gradients on the device, AdamW on the host."""
    return Strategy(
        name=name,
        world_size=world_size,
        micro_batch=micro_batch,
        stack=STACKS["zero_offload"],
        dense=Dense(fsdp=dense_shard or world_size, prefetch=prefetch),
        attention=Attention(context_parallel=sequence),
        experts=Experts(expert_parallel=experts, expert_fsdp=expert_shard or max(1, world_size // experts)),
        vocabulary=Vocabulary(loss=loss, chunk_tokens=loss_chunk_tokens if loss == "chunked" else 0),
        optimizer=_state("host"),
        activations=Activations(recompute="full", layer_inputs=boundary_tier),
        precision=_low_precision(precision, keep_master=True),
    )


def megatron(
    world_size: int,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    virtual_stages: int = 1,
    sequence: int = 1,
    experts: int = 1,
    expert_tensor: int = 1,
    micro_batch: int = 1,
    recompute: Literal["none", "selective", "full"] = "none",
    modules: tuple[str, ...] = ("core_attn",),
    boundary_tier: Tier = "device",
    overlap: Overlap | None = None,
    precision: DType = "bfloat16",
    name: str = "megatron",
) -> Strategy:
    """Megatron-Core: tensor (with sequence), pipeline, context and expert parallelism, distributed optimizer.

    ZeRO-1; gradients are kept and reduced in the stack's dtype (fp32 by Megatron-Core's arguments), and what
    is hidden is the stack's, where `overlap` is None. `sequence` is context parallelism by ring exchange;
    ETP may differ from TP (parallel folding). Not run by mopexec: simulated, and exported.
    """
    stage_ranks, wide = max(1, world_size // max(pipeline, 1)), _wide(precision)
    grads: Literal["stack", "float64"] = "float64" if wide == "float64" else "stack"
    return Strategy(
        name=name,
        world_size=world_size,
        micro_batch=micro_batch,
        stack=STACKS["megatron"],
        pipeline=Pipeline(
            pipeline_parallel=pipeline,
            virtual_stages=virtual_stages,
            schedule="interleaved" if virtual_stages > 1 else "1f1b",
        ),
        dense=Dense(
            tensor_parallel=tensor,
            fsdp=max(1, stage_ranks // tensor),
            zero=1,
            reshard_after_forward=False,
            prefetch=0,
        ),
        attention=Attention(context_parallel=sequence, cp_comm_type="ring"),
        experts=Experts(
            expert_parallel=experts,
            expert_tensor_parallel=expert_tensor,
            expert_fsdp=max(1, stage_ranks // (experts * expert_tensor)),
        ),
        vocabulary=Vocabulary(vocab_parallel=tensor, loss="vocab_parallel" if tensor > 1 else "full"),
        optimizer=_state("device"),
        activations=Activations(
            recompute=recompute,
            modules=modules if recompute == "selective" else (),
            layer_inputs=boundary_tier,
        ),
        overlap=overlap or AS_STACK,
        precision=Precision(
            compute=precision, param=precision, reduce=grads, grad=grads, moments=wide, master=wide
        ),
    )
