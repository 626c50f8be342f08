"""Strategy families with the field's keyword names. World size is left open: it is that of the nodes.

A degree says over how many ranks something is split; 1 = not at all. `fsdp` and `expert_fsdp` are the ranks
that share one copy of the state; 0 = all that there are.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, Literal, ParamSpec

from mopsim import strategies
from mopsim.spec.strategy import DType, Exchange, Order, Overlap, Strategy
from mopsim.strategies import State

P = ParamSpec("P")


@dataclass(frozen=True)
class StrategyTemplate:
    """A strategy for any number of ranks: `mopsim.mop(expert_parallel=8).on(16)` is that of 16 ranks."""

    family: str
    given: dict[str, Any]
    build: Callable[[int], Strategy] = field(repr=False, compare=False)

    def on(self, world_size: int) -> Strategy:
        """The Strategy of `world_size` ranks. Raises SpecError naming a degree that does not divide them."""
        return self.build(world_size)

    def __repr__(self) -> str:
        return f"{self.family}({', '.join(f'{name}={value!r}' for name, value in self.given.items())})"


def _template(make: Callable[Concatenate[int, P], Strategy]) -> Callable[P, StrategyTemplate]:
    """`make` without its first argument, world_size, which is given later."""
    signature = inspect.signature(make)
    keywords = {name: one for name, one in signature.parameters.items() if name != "world_size"}

    @wraps(make)
    def later(*args: P.args, **given: P.kwargs) -> StrategyTemplate:
        try:
            signature.bind(1, *args, **given)
        except TypeError as error:
            raise TypeError(f"{make.__name__}() {error}; its keywords: {', '.join(keywords)}") from None
        return StrategyTemplate(make.__name__, dict(given), lambda ranks: make(ranks, *args, **given))

    later.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=list(keywords.values()), return_annotation=StrategyTemplate
    )
    return later


@_template
def mop(
    world_size: int,
    *,
    context_parallel: int = 1,
    expert_parallel: int = 1,
    vocab_parallel: int = 1,
    fsdp: int = 0,
    expert_fsdp: int = 0,
    micro_batch: int = 1,
    expert_chunk_tokens: int = 8192,
    max_expert_chunks: int = 10,
    ffn_chunk_tokens: int = 0,
    loss_chunk_tokens: int = 0,
    optimizer: State = "host_streamed",
    optimizer_bucket_params: int = 100_000_000,
    optimizer_slots: int = 2,
    offload_inputs: bool = True,
    offload_inputs_bytes: int = 0,
    prefetch: int = 1,
    rank_placement: Order = "contiguous",
    dtype: DType = "bfloat16",
    name: str = "mop",
) -> Strategy:
    """Mixture-of-Parallelisms (arXiv 2607.01844): ZeRO-3, chunked experts, ring loss, recompute.

    expert_chunk_tokens: tokens of a rank that are dispatched at a time, in at most max_expert_chunks pieces.
    ffn_chunk_tokens, loss_chunk_tokens: tokens of a slice of the dense FFN and of the loss; 0 = all at once.
    optimizer: where AdamW's fp32 state lives: `device`; `host_streamed`, moved through the device in buckets
    of optimizer_bucket_params parameters and optimizer_slots buffers; `host`, which updates it too.
    offload_inputs: layer inputs wait for their backward in pinned host memory, offload_inputs_bytes of it at
    most per rank (0 = no cap). prefetch: layers whose parameters are gathered ahead of use.
    """
    return strategies.mop(
        world_size,
        sequence=context_parallel,
        experts=expert_parallel,
        vocabulary=vocab_parallel,
        dense_shard=fsdp,
        expert_shard=expert_fsdp,
        micro_batch=micro_batch,
        chunk_tokens=expert_chunk_tokens,
        max_chunks=max_expert_chunks,
        ffn_chunk_tokens=ffn_chunk_tokens,
        loss_chunk_tokens=loss_chunk_tokens,
        state=optimizer,
        bucket_params=optimizer_bucket_params,
        slots=optimizer_slots,
        boundary_tier="host" if offload_inputs else "device",
        host_budget=offload_inputs_bytes,
        prefetch=prefetch,
        order=rank_placement,
        precision=dtype,
        name=name,
    )


@_template
def fsdp2(
    world_size: int,
    *,
    tensor_parallel: int = 1,
    context_parallel: int = 1,
    context_exchange: Exchange = "ulysses",
    expert_parallel: int = 1,
    fsdp: int = 0,
    micro_batch: int = 1,
    recompute: Literal["none", "full"] = "full",
    loss: Literal["full", "chunked"] = "full",
    loss_chunk_tokens: int = 1024,
    offload: bool = False,
    reshard_after_forward: bool = True,
    prefetch: int = 1,
    dtype: DType = "bfloat16",
    name: str = "fsdp2",
) -> Strategy:
    """torch's FSDP2: fp32 sharded parameters, computed in `dtype`, gradients reduced in fp32.

    fsdp: below the world it is HSDP. offload: parameters, gradients and optimizer on the host, updated there
    (CPUOffloadPolicy). context_exchange: how context-parallel ranks trade a sequence. tensor_parallel above 1
    has sequence parallelism and the loss over the split vocabulary, as in TorchTitan.
    """
    return strategies.fsdp2(
        world_size,
        tensor=tensor_parallel,
        sequence=context_parallel,
        exchange=context_exchange,
        experts=expert_parallel,
        dense_shard=fsdp,
        micro_batch=micro_batch,
        recompute=recompute,
        loss=loss,
        loss_chunk_tokens=loss_chunk_tokens,
        offload=offload,
        reshard=reshard_after_forward,
        prefetch=prefetch,
        precision=dtype,
        name=name,
    )


@_template
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
    prefetch: int = 1,
    dtype: DType = "bfloat16",
    name: str = "zero_offload",
) -> Strategy:
    """ZeRO-Offload (arXiv 2101.06840) on ZeRO-3: weights and gradients on the device, AdamW on the host."""
    return strategies.zero_offload(
        world_size,
        sequence=context_parallel,
        experts=expert_parallel,
        dense_shard=fsdp,
        expert_shard=expert_fsdp,
        micro_batch=micro_batch,
        loss=loss,
        loss_chunk_tokens=loss_chunk_tokens,
        boundary_tier="host" if offload_inputs else "device",
        prefetch=prefetch,
        precision=dtype,
        name=name,
    )


@_template
def megatron(
    world_size: int,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    virtual_stages: int = 1,
    context_parallel: int = 1,
    expert_parallel: int = 1,
    expert_tensor_parallel: int = 1,
    micro_batch: int = 1,
    recompute: Literal["none", "selective", "full"] = "none",
    recompute_modules: tuple[str, ...] = ("core_attn",),
    offload_inputs: bool = False,
    overlap: Overlap | None = None,
    dtype: DType = "bfloat16",
    name: str = "megatron",
) -> Strategy:
    """Megatron-Core: tensor (with sequence), pipeline, context and expert parallelism, distributed optimizer.

    virtual_stages: parts of a pipeline rank (interleaved schedule). recompute_modules: what `selective` runs
    again. overlap: which communication runs beside compute (mopsim.spec.strategy.Overlap). ZeRO-1 over all
    ranks of a stage. mopexec does not run it; `mopsim export` writes it.
    """
    return strategies.megatron(
        world_size,
        tensor=tensor_parallel,
        pipeline=pipeline_parallel,
        virtual_stages=virtual_stages,
        sequence=context_parallel,
        experts=expert_parallel,
        expert_tensor=expert_tensor_parallel,
        micro_batch=micro_batch,
        recompute=recompute,
        modules=recompute_modules,
        boundary_tier="host" if offload_inputs else "device",
        overlap=overlap,
        precision=dtype,
        name=name,
    )
