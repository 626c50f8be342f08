"""The storage of `fully_shard`: torch's FSDP2 over what this rank holds, weights made shard by shard."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard

from mopexec.distributed.mesh import Mesh
from mopexec.distributed.tiers import Platform
from mopexec.measure.scope import category, host_allocation, uncounted
from mopexec.model.moe import RoutedExperts
from mopexec.modules.comm import TrackedAllGather, TrackedReduceScatter, local
from mopexec.modules.fsdp_internals import lazy_init, sum_gradients
from mopexec.modules.groups import FsdpMeshes
from mopexec.modules.network import RankNetwork
from mopexec.modules.slices import Block, part_of
from mopexec.operators.dtypes import of_name
from mopexec.weights.load import fill_block
from mopexec.weights.source import Source
from mopsim.spec.layout import even_dim
from mopsim.spec.strategy import Strategy


def store(
    network: RankNetwork, strategy: Strategy, mesh: Mesh, platform: Platform, source: Source
) -> dict[str, Block]:
    """Shard the parameters of a rank's part of the network, and fill the shards; what this rank then has of
    each parameter."""
    model, host = network.model, strategy.optimizer.state_tier == "host"
    with platform.bookkeeping():
        meshes = FsdpMeshes.of(strategy, mesh, platform)
    with host_allocation("params") if host else category("params"):
        _shard(model, strategy, meshes, platform)
        found = _parts(network, mesh)
        if not platform.fake:  # fake parameters became shards when they were sharded
            model.to_empty(device="cpu" if host else platform.device)
            network.tie()
            _fill(model, found, source)
        lazy_init(model)
    _tune(network, strategy)
    return found


def _parts(network: RankNetwork, mesh: Mesh) -> dict[str, Block]:
    found = {}
    for name, parameter in network.model.named_parameters():
        block = network.blocks[name]
        group = mesh.expert_shard if block.kind == "experts" else mesh.dense_shard
        found[name] = part_of(block, parameter.placements[-1].dim, group)
    return found


def _shard(model: Any, strategy: Strategy, meshes: FsdpMeshes, platform: Platform) -> None:
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
        return Shard(even_dim(parameter.shape, degree))

    for layer in model.blocks():
        if layer.is_moe:
            fully_shard(
                layer.moe.experts, mesh=meshes.experts, reshard_after_forward=reshard,
                shard_placement_fn=placement, **options,
            )  # fmt: skip
    for module in (*model.layers, *model.mtp):
        if _holds(module):
            fully_shard(module, mesh=meshes.dense, reshard_after_forward=reshard, **options)
    last = [model.final_norm, model.head]
    if model.spec.tie_word_embeddings:
        last.insert(0, model.embedding)  # FSDP keeps a shared weight in one group
    elif _holds(model.embedding):
        fully_shard(model.embedding, mesh=meshes.dense, reshard_after_forward=reshard, **options)
    if _holds(model.head):
        fully_shard(last, mesh=meshes.dense, reshard_after_forward=False, **options)
    fully_shard(model, mesh=meshes.dense, **options)


def _holds(module: Any) -> bool:
    """Whether the stage has it."""
    return next(module.parameters(), None) is not None


def _tune(network: RankNetwork, strategy: Strategy) -> None:
    """Sum gradients (the loss is divided by the global token count), name the buffers, prefetch explicitly.

    Asynchronous all-gathers allocate and copy on the compute stream and free their buffer right after the
    copy-out.
    Offloaded shards keep FSDP's own streams, or every copy to the device would stand in the way of the
    compute.
    """
    model = network.model
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        sum_gradients(module, unshard_async=strategy.optimizer.state_tier == "device")
        module.set_custom_all_gather(TrackedAllGather())
        module.set_custom_reduce_scatter(TrackedReduceScatter())
    if not model.spec.tie_word_embeddings and _holds(model.embedding):
        model.embedding.set_unshard_in_backward(False)
    for modules in network.sequences():
        _prefetch(model, modules, strategy.dense.prefetch)


def _prefetch(model: Any, modules: Sequence[Any], depth: int) -> None:
    """Gather `depth` modules ahead, forward and backward; 0: none (FSDP's implicit backward prefetch off
    too). MTP modules look up embeddings again, after the layers: nothing is gathered ahead there. modules: of
    a part of the network, in order."""
    tied = model.spec.tie_word_embeddings
    chain = [[module, *_experts(module)] for module in modules if not (tied and module is model.final_norm)]
    for place, entry in enumerate(chain):
        module, begins = entry[0], int(chain[0][0] is model.embedding)
        ahead = [one for later in chain[place + 1 : place + 1 + depth] for one in later]
        behind = [m for one in reversed(chain[max(begins, place - depth) : place]) for m in reversed(one)]
        if ahead and not (module is model.embedding and len(model.mtp)):
            module.set_modules_to_forward_prefetch(ahead)
        module.set_modules_to_backward_prefetch(behind or [module])
        for inner in entry[1:]:
            inner.set_modules_to_backward_prefetch([inner])


def _experts(module: Any) -> list[Any]:
    """Routed experts inside, which have a group of their own."""
    return [inner for inner in module.modules() if isinstance(inner, RoutedExperts)]


def _fill(model: Any, parts: Mapping[str, Block], source: Source) -> None:
    """Write this rank's part of the source's weights, one matrix at a time."""
    for name, parameter in model.named_parameters():
        own, part = local(parameter), parts[name]
        if own.numel():
            with uncounted():
                fill_block(own, name, part.shape, part.start, source)
