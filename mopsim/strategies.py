"""Strategy families: functions that return a Strategy. Nothing anywhere branches on a name.

A degree says over how many ranks something is split; 1 = not at all. `fsdp` and `expert_fsdp` are the ranks
that share one copy of the state; 0 = all that there are.
"""

from typing import Literal

from msgspec.structs import replace

from mopsim.spec.categories import FAMILIES as FAMILIES
from mopsim.spec.strategy import (
    Activations,
    Attention,
    Dense,
    Dispatcher,
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
    UpdateOverlap,
    Vocabulary,
)

STACKS = {
    "mop": "mopexec-flat",
    "fsdp2": "mopexec-fsdp2",
    "zero_offload": "mopexec-flat",
    "megatron": "megatron-core",
}
"""The software that a family's strategies are meant for, where no other is given."""

CHUNK_TOKENS = 8192
"""Tokens of a rank that MoP dispatches at a time, unless told."""
AS_STACK = Overlap(grad_reduce=None, param_gather=None, pipeline=None, tensor=None, experts=None)
"""Communication is hidden as the software does it."""

State = Literal["device", "host_streamed", "host"]
"""Where the optimizer lives: on the device; on the host, streamed through the device; on the host,
updated there."""

Wide = Literal["float32", "float64"]


def _wide(precision: DType) -> Wide:
    """The dtype of master weights and moments: float64 only where everything is float64."""
    return "float64" if precision == "float64" else "float32"


def _low_precision(precision: DType, grads: DType | None, *, keep_master: bool) -> Precision:
    """Weights in `precision`; sums of gradients, master and moments in fp32 (fp64 in float64)."""
    wide = _wide(precision)
    return Precision(
        compute=precision,
        param=precision,
        reduce=grads or wide,
        grad=grads or wide,
        moments=wide,
        master=wide if keep_master or precision != wide else "param",
    )


def _state(
    state: State, bucket_params: int = 100_000_000, slots: int = 2, host_fraction: float = 1.0, *,
    overlap: UpdateOverlap | bool = "none",
) -> Optimizer:  # fmt: skip
    """overlap: true is `next_forward`."""
    side: Tier = "host" if state == "host" else "device"
    return Optimizer(
        state_tier=_tier(state != "device"),
        update_on=side,
        bucket_params=bucket_params,
        slots=slots,
        host_fraction=host_fraction if state != "device" else 1.0,
        overlap=overlap if isinstance(overlap, str) else "next_forward" if overlap else "none",
    )


def _tier(on_host: bool) -> Tier:
    return "host" if on_host else "device"


def _rest(ranks: int, degree: int) -> int:
    """Ranks that each part has; a degree below 1 is refused by the Strategy."""
    return max(1, ranks // max(1, degree))


def _pipeline(degree: int, virtual_stages: int, layers: tuple[int, ...] = ()) -> Pipeline:
    return Pipeline(
        pipeline_parallel=degree, virtual_stages=virtual_stages, layers=layers,
        schedule="interleaved" if virtual_stages > 1 else "1f1b",
    )  # fmt: skip


def mop(
    world_size: int,
    *,
    context_parallel: int = 1,
    expert_parallel: int = 1,
    vocab_parallel: int = 1,
    fsdp: int = 0,
    expert_fsdp: int = 0,
    micro_batch: int = 1,
    expert_chunk_tokens: int = CHUNK_TOKENS,
    max_expert_chunks: int = 10,
    ffn_chunk_tokens: int = 0,
    loss_chunk_tokens: int = 0,
    optimizer: State = "host_streamed",
    optimizer_bucket_params: int = 100_000_000,
    optimizer_slots: int = 2,
    optimizer_overlap: UpdateOverlap | bool = False,
    offload_inputs: bool = True,
    offload_inputs_bytes: int = 0,
    prefetch: int = 1,
    rank_placement: Order = "contiguous",
    dtype: DType = "bfloat16",
    grad_dtype: DType | None = None,
    name: str = "mop",
) -> Strategy:
    """Mixture-of-Parallelisms (arXiv 2607.01844): ZeRO-3, chunked experts, ring loss, recomputation.

    Each degree is chosen separately: D = context_parallel, Ep = expert_parallel, P = vocab_parallel.
    expert_chunk_tokens: tokens of a rank that are dispatched at a time (c), in at most max_expert_chunks
    chunks. ffn_chunk_tokens: tokens of a slice of the dense FFN; 0: all at once. loss_chunk_tokens: tokens
    of a slice of the loss; 0: all at once. optimizer: where AdamW's fp32 state lives. `device`: on the
    device. `host_streamed`: on the host, and streamed through the device in buckets of
    optimizer_bucket_params parameters (beta) and optimizer_slots buffers. `host`: on the host, which
    updates it too. optimizer_overlap: the streamed update runs beside the next forward (the same update).
    offload_inputs: layer inputs wait for their backward in pinned host memory. offload_inputs_bytes: most
    bytes of it for each rank; 0: no cap. prefetch: number of layers whose parameters are gathered ahead of
    use. rank_placement: placement of the expert groups. grad_dtype: dtype of the sums of gradients over
    chunks, ranks and microbatches; None: fp32, as in FSDP2 (fp64 in float64)."""
    return Strategy(
        name=name,
        world_size=world_size,
        micro_batch=micro_batch,
        stack=STACKS["mop"],
        dense=Dense(fsdp=fsdp or world_size, prefetch=prefetch, chunk_tokens=ffn_chunk_tokens),
        attention=Attention(context_parallel=context_parallel),
        experts=Experts(
            expert_parallel=expert_parallel,
            expert_fsdp=expert_fsdp or _rest(world_size, expert_parallel),
            chunk_tokens=expert_chunk_tokens,
            max_chunks=max_expert_chunks,
            rank_placement=rank_placement,
        ),
        vocabulary=Vocabulary(vocab_parallel=vocab_parallel, loss="ring", chunk_tokens=loss_chunk_tokens),
        optimizer=_state(optimizer, optimizer_bucket_params, optimizer_slots, overlap=optimizer_overlap),
        activations=Activations(
            recompute="full", layer_inputs=_tier(offload_inputs), host_budget=offload_inputs_bytes
        ),
        precision=_low_precision(dtype, grad_dtype, keep_master=optimizer != "device"),
    )


def fsdp2(
    world_size: int,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    virtual_stages: int = 1,
    stage_layers: tuple[int, ...] = (),
    context_parallel: int = 1,
    context_exchange: Exchange = "ulysses",
    expert_parallel: int = 1,
    expert_tensor_parallel: int = 1,
    fsdp: int = 0,
    expert_fsdp: int = 0,
    micro_batch: int = 1,
    recompute: Literal["none", "selective", "full"] = "full",
    recompute_modules: tuple[str, ...] = (),
    save_ops: tuple[str, ...] = (),
    recompute_num_layers: int = 0,
    loss: Literal["full", "chunked"] = "full",
    loss_chunk_tokens: int = 1024,
    offload: bool = False,
    reshard_after_forward: bool = True,
    prefetch: int = 1,
    dtype: DType = "bfloat16",
    name: str = "fsdp2",
) -> Strategy:
    """torch's FSDP2 as its users tune it: fp32 sharded parameters (the master), computed in `dtype`,
    gradients reduced in fp32.

    fsdp: ranks that share one copy; below the world size it is HSDP. expert_fsdp: the same of routed
    experts; 0: all of their replicas. offload: parameters, gradients and optimizer are on the host and
    updated there (CPUOffloadPolicy). tensor_parallel above 1 has sequence parallelism and the loss over the
    split vocabulary, whatever `loss` says. virtual_stages: parts of a pipeline rank, interleaved.
    stage_layers: decoder layers of each part; empty: as even as can be. Recomputation: see Activations."""
    stage_ranks, split = _rest(world_size, pipeline_parallel), tensor_parallel > 1
    wide, tier = _wide(dtype), _tier(offload)
    return Strategy(
        name=name, world_size=world_size, micro_batch=micro_batch, stack=STACKS["fsdp2"],
        pipeline=_pipeline(pipeline_parallel, virtual_stages, stage_layers),
        dense=Dense(
            tensor_parallel=tensor_parallel, fsdp=fsdp or _rest(stage_ranks, tensor_parallel),
            reshard_after_forward=reshard_after_forward, prefetch=prefetch, param_tier=tier, grad_tier=tier,
        ),
        attention=Attention(context_parallel=context_parallel, cp_comm_type=context_exchange),
        experts=Experts(
            expert_parallel=expert_parallel, expert_tensor_parallel=expert_tensor_parallel,
            expert_fsdp=expert_fsdp or _rest(stage_ranks, expert_parallel * expert_tensor_parallel),
            param_tier=tier, grad_tier=tier,
        ),
        vocabulary=Vocabulary(
            vocab_parallel=tensor_parallel, loss="vocab_parallel" if split else loss,
            chunk_tokens=loss_chunk_tokens if loss == "chunked" and not split else 0,
        ),
        optimizer=_state("host" if offload else "device"),
        activations=Activations(
            recompute=recompute, modules=recompute_modules, save_ops=save_ops,
            recompute_num_layers=recompute_num_layers,
        ),
        precision=Precision(compute=dtype, param=wide, reduce=wide, grad=wide, moments=wide, master="param"),
    )  # fmt: skip


def zero_offload(
    world_size: int,
    *,
    context_parallel: int = 1,
    expert_parallel: int = 1,
    fsdp: int = 0,
    expert_fsdp: int = 0,
    micro_batch: int = 1,
    loss: Literal["full", "chunked"] = "full",
    loss_chunk_tokens: int = 1024,
    offload_inputs: bool = False,
    offload_inputs_bytes: int = 0,
    prefetch: int = 1,
    dtype: DType = "bfloat16",
    grad_dtype: DType | None = None,
    name: str = "zero_offload",
) -> Strategy:
    """ZeRO-Offload (arXiv 2101.06840) on ZeRO-3: weights and gradients on the device, AdamW on the host.

    grad_dtype: dtype of the sums of gradients; None: fp32 (fp64 in float64)."""
    whole = mop(
        world_size, context_parallel=context_parallel, expert_parallel=expert_parallel, fsdp=fsdp,
        expert_fsdp=expert_fsdp, micro_batch=micro_batch, expert_chunk_tokens=0, optimizer="host",
        offload_inputs=offload_inputs, offload_inputs_bytes=offload_inputs_bytes, prefetch=prefetch,
        dtype=dtype, grad_dtype=grad_dtype, name=name,
    )  # fmt: skip
    chunk_tokens = loss_chunk_tokens if loss == "chunked" else 0
    return replace(whole, vocabulary=Vocabulary(loss=loss, chunk_tokens=chunk_tokens))


def megatron(
    world_size: int,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    virtual_stages: int = 1,
    stage_layers: tuple[int, ...] = (),
    context_parallel: int = 1,
    context_exchange: Exchange = "ring",
    expert_parallel: int = 1,
    expert_tensor_parallel: int = 1,
    token_dispatcher: Dispatcher = "alltoall",
    micro_batch: int = 1,
    recompute: Literal["none", "selective", "full"] = "none",
    recompute_modules: tuple[str, ...] = (),
    save_ops: tuple[str, ...] = (),
    recompute_num_layers: int = 0,
    offload_inputs: bool = False,
    optimizer_on_host: float = 0.0,
    overlap: Overlap | None = None,
    dtype: DType = "bfloat16",
    name: str = "megatron",
) -> Strategy:
    """Tensor (with sequence), pipeline, context and expert parallelism, distributed optimizer.

    virtual_stages: parts of a pipeline rank, interleaved. stage_layers: decoder layers of each part; empty:
    as evenly as possible. context_exchange: how context-parallel ranks exchange a sequence. token_dispatcher:
    how rows reach their experts. recompute_modules: modules that `selective` runs again; empty: the stack's.
    save_ops: kernels that `full` does not run again. recompute_num_layers: of each model chunk, layers that
    it runs again; 0: all. optimizer_on_host: part of AdamW's state on the host.
    overlap: communication that runs beside compute; None: what the stack hides. ZeRO-1 shards over all ranks
    of a stage. Gradients have the stack's dtype (fp32 for `megatron-core`). expert_tensor_parallel may differ
    from tensor_parallel (parallel folding). mopexec runs it on `mopexec-split`."""
    stage_ranks, wide = _rest(world_size, pipeline_parallel), _wide(dtype)
    grads: Literal["stack", "float64"] = "float64" if wide == "float64" else "stack"
    return Strategy(
        name=name, world_size=world_size, micro_batch=micro_batch, stack=STACKS["megatron"],
        dense=Dense(
            tensor_parallel=tensor_parallel, fsdp=_rest(stage_ranks, tensor_parallel), zero=1,
            reshard_after_forward=False, prefetch=0,
        ),
        pipeline=_pipeline(pipeline_parallel, virtual_stages, stage_layers),
        attention=Attention(context_parallel=context_parallel, cp_comm_type=context_exchange),
        experts=Experts(
            expert_parallel=expert_parallel, expert_tensor_parallel=expert_tensor_parallel,
            expert_fsdp=_rest(stage_ranks, expert_parallel * expert_tensor_parallel),
            token_dispatcher=token_dispatcher,
        ),
        vocabulary=Vocabulary(
            vocab_parallel=tensor_parallel, loss="vocab_parallel" if tensor_parallel > 1 else "full"
        ),
        optimizer=_state("host" if optimizer_on_host else "device", host_fraction=optimizer_on_host),
        activations=Activations(
            recompute=recompute, layer_inputs=_tier(offload_inputs), save_ops=save_ops,
            recompute_num_layers=recompute_num_layers,
            modules=recompute_modules if recompute == "selective" else (),
        ),
        overlap=overlap or AS_STACK,
        precision=Precision(compute=dtype, param=dtype, reduce=grads, grad=grads, moments=wide, master=wide),
    )  # fmt: skip
