"""From a plan to a model under torch FSDP2: parallel parts swapped in, `fully_shard` applied, weights made
shard by shard."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from mopexec.distributed.tiers import Platform
from mopexec.measure.scope import category, host_allocation, uncounted
from mopexec.model import Routing, Transformer
from mopexec.model.moe import Router
from mopexec.model.transformer import Term
from mopexec.modules.comm import TrackedAllGather, TrackedReduceScatter, local
from mopexec.modules.compiled import compile_blocks
from mopexec.modules.experts import ExpertDispatch
from mopexec.modules.fsdp_internals import lazy_init, sum_gradients
from mopexec.modules.groups import FsdpGroups
from mopexec.modules.hooks import InputHooks, name_components, recompute_layers
from mopexec.modules.loss import chunked_loss, compute_losses, full_loss
from mopexec.modules.sequence import UlyssesAttention, auxiliary, with_following
from mopexec.operators.documents import Documents
from mopexec.operators.dtypes import of_name
from mopexec.weights.load import fill_block
from mopexec.weights.source import Source
from mopsim.spec.plan import Plan
from mopsim.spec.strategy import Strategy


def build_model(
    plan: Plan, groups: FsdpGroups, platform: Platform, routing: Routing, source: Source
) -> Transformer:
    """The sharded model on this rank; called with (tokens, targets, scale) it gives scale * the loss."""
    strategy = plan.strategy
    with uncounted():  # without storage: the shards are what is counted
        device = "cpu" if platform.fake else "meta"
        model = Transformer(plan.model, of_name(strategy.precision.param), device, routing)
    _spread_experts(model, strategy, groups, platform)
    model.set_auxiliary(auxiliary(plan.training, groups.sequence))
    if groups.sequence.size > 1:
        for layer in model.blocks():
            layer.attention.core = UlyssesAttention(groups.sequence)
    if strategy.compile == "block":
        compile_blocks(model)
    if strategy.activations.recompute == "full":
        recompute_layers(model, InputHooks.of(plan, platform))
    _attach_loss(model, strategy, groups, plan.training.tokens_per_rank(strategy) // strategy.micro_batch)
    name_components(model)
    host = strategy.optimizer.state_tier == "host"
    with host_allocation("params") if host else category("params"):
        _shard(model, strategy, groups, platform)
        if not platform.fake:  # fake parameters became shards when they were sharded
            model.to_empty(device="cpu" if host else platform.device)
            if plan.model.tie_word_embeddings:
                model.head.weight = model.embedding.weight
            _fill(model, groups, source)
        lazy_init(model)
    reset_routers(model, platform, source)
    _tune(model, strategy)
    return model


def shard_dim(local_shape: tuple[int, ...], degree: int) -> int:
    """Which dimension of an expert stack [E/Ep, ., .] its replicas split: the experts, where they divide
    evenly."""
    even = [dim for dim, size in enumerate(local_shape) if size % degree == 0]
    return even[0] if even else 0


def _spread_experts(model: Any, strategy: Strategy, groups: FsdpGroups, platform: Platform) -> None:
    """Keep this rank's E/Ep experts in every MoE layer, and dispatch to their owners."""
    for layer in model.blocks():
        if not layer.is_moe:
            continue
        for name, stack in list(layer.moe.experts.named_parameters()):
            own = stack[: stack.shape[0] // strategy.experts.expert_parallel].detach()
            setattr(layer.moe.experts, name, torch.nn.Parameter(own.contiguous()))
        layer.moe.dispatch = ExpertDispatch(
            model.routing, model.spec.num_local_experts, groups.experts_spread, platform
        )


def _attach_loss(model: Any, strategy: Strategy, groups: FsdpGroups, seq: int) -> None:
    """The model called with (tokens, targets, scale) gives scale * the loss."""
    head, chunk, sequence = model.head, strategy.vocabulary.chunk_tokens, groups.sequence

    def one(term: Term) -> Tensor:
        hidden, targets = term.hidden.flatten(0, 1), term.targets.flatten()
        if strategy.vocabulary.loss == "chunked":
            return chunked_loss(hidden, head.weight, targets, term.weight, chunk)
        return full_loss(hidden, head.weight, targets, term.weight)

    def forward(tokens: Tensor, targets: Tensor, scale: float, documents: Documents = ()) -> Tensor:
        ids = with_following(tokens, targets, len(model.mtp), sequence)
        return cast(Tensor, head(model.terms(*ids, sequence.place * seq, scale, documents)))

    compute_losses(head, one)
    model.forward = forward


def _shard(model: Any, strategy: Strategy, groups: FsdpGroups, platform: Platform) -> None:
    """`fully_shard` per experts, layer, embedding, (final norm, head), and the root, innermost first."""
    precision = strategy.precision
    reshard = strategy.dense.zero == 3 and strategy.dense.reshard_after_forward
    offload = strategy.optimizer.state_tier == "host"
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=of_name(precision.compute),
            reduce_dtype=of_name(precision.reduce),
            cast_forward_inputs=False,
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=platform.is_cuda) if offload else OffloadPolicy(),
    }
    degree = strategy.experts.expert_fsdp

    def placement(parameter: Tensor) -> Shard:
        return Shard(shard_dim(tuple(parameter.shape), degree))

    for layer in model.blocks():
        if layer.is_moe:
            fully_shard(
                layer.moe.experts, mesh=groups.experts, reshard_after_forward=reshard,
                shard_placement_fn=placement, **options,
            )  # fmt: skip
    for module in (*model.layers, *model.mtp):
        fully_shard(module, mesh=groups.dense, reshard_after_forward=reshard, **options)
    last = [model.final_norm, model.head]
    if model.spec.tie_word_embeddings:
        last.insert(0, model.embedding)  # FSDP keeps a shared weight in one group
    else:
        fully_shard(model.embedding, mesh=groups.dense, reshard_after_forward=reshard, **options)
    fully_shard(last, mesh=groups.dense, reshard_after_forward=False, **options)
    fully_shard(model, mesh=groups.dense, **options)


def _tune(model: Any, strategy: Strategy) -> None:
    """Sum gradients (the loss is divided by the global token count), name the buffers, prefetch explicitly.

    Asynchronous all-gathers allocate and copy on the compute stream and free their buffer right after the
    copy-out.
    Offloaded shards keep FSDP's own streams, or every copy to the device would stand in the way of the
    compute.
    """
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        sum_gradients(module, unshard_async=strategy.optimizer.state_tier == "device")
        module.set_custom_all_gather(TrackedAllGather())
        module.set_custom_reduce_scatter(TrackedReduceScatter())
    if not model.spec.tie_word_embeddings:
        model.embedding.set_unshard_in_backward(False)
    _prefetch(model, strategy.dense.prefetch)


def _prefetch(model: Any, depth: int) -> None:
    """Gather `depth` modules ahead, forward and backward; 0: none (FSDP's implicit backward prefetch off
    too). MTP modules look up embeddings again, after the layers: nothing is gathered ahead there."""
    units = [[module] for module in (*model.layers, *model.mtp)]
    for entry, layer in zip(units, model.blocks(), strict=True):
        if layer.is_moe:
            entry.append(layer.moe.experts)
    last = [] if model.spec.tie_word_embeddings else [[model.final_norm]]
    chain = [[model.embedding], *units, *last]
    for place, modules in enumerate(chain):
        ahead = [module for entry in chain[place + 1 : place + 1 + depth] for module in entry]
        behind = [m for entry in reversed(chain[max(1, place - depth) : place]) for m in reversed(entry)]
        if ahead and not (modules[0] is model.embedding and len(model.mtp)):
            modules[0].set_modules_to_forward_prefetch(ahead)
        modules[0].set_modules_to_backward_prefetch(behind or [modules[0]])
        for inner in modules[1:]:
            inner.set_modules_to_backward_prefetch([inner])


def reset_routers(model: Any, platform: Platform, source: Source) -> None:
    """Balance biases start at zero or as in the source, loads at zero, on the device."""
    for name, module in model.named_modules():
        if isinstance(module, Router):
            module.balance_bias = torch.zeros_like(module.balance_bias, device=platform.device)
            module.load = torch.zeros_like(module.balance_bias)
            start = None if platform.fake else source.buffer(f"{name}.balance_bias")
            if start is not None:
                module.balance_bias.copy_(start)


def _fill(model: Any, groups: FsdpGroups, source: Source) -> None:
    """Write this rank's part of the source's weights, one matrix at a time."""
    for name, parameter in model.named_parameters():
        own = local(parameter)
        whole = groups.global_dtensor(name, parameter, own)
        shape = tuple(whole.shape)
        _, start = compute_local_shape_and_global_offset(shape, whole.device_mesh, whole.placements)
        with uncounted():
            fill_block(own, name, shape, start, source)
