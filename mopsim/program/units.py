"""Units: the parameters that are gathered and reduced together, and how each is sharded."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from msgspec import Struct, structs

from mopsim.spec.categories import JOINED
from mopsim.spec.layout import ceil_div, even_dim, shard_numel
from mopsim.spec.model import ModelSpec
from mopsim.spec.sharding import Sharding
from mopsim.spec.strategy import Strategy
from mopsim.spec.tensors import Tensor, split_dim, tensors

Sizes = tuple[int, ...]
"""Elements of each tensor, in the order of their modules."""


class ShardedUnit(Struct, frozen=True):
    """One flat unit on one rank. numel: of the full (gathered) unit; shard: ranks that share a copy;
    copies: ranks that hold one.

    sizes: elements of each parameter that it consists of; across: of those that are sharded along another
    dimension than the first.
    group: name of the shard's process group; replicas: name of the group over which copies beyond `shard`
    are reduced.
    """

    name: str
    component: str
    layer: int
    numel: int
    shard: int
    copies: int
    group: str
    replicas: str
    sizes: Sizes = (0,)
    across: Sizes = ()

    @property
    def tensors(self) -> int:
        return len(self.sizes)

    @property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(self.sizes)

    @property
    def last(self) -> int:
        """Elements of the last parameter."""
        return self.sizes[-1]

    @property
    def shard_numel(self) -> int:
        return shard_numel(self.numel, self.shard)

    @property
    def padded(self) -> int:
        return self.shard_numel * self.shard


def joined(units: Sequence[ShardedUnit]) -> ShardedUnit:
    """One unit of all their parameters."""
    sizes = tuple(size for unit in units for size in unit.sizes)
    across = tuple(size for unit in units for size in unit.across)
    return structs.replace(units[0], numel=sum(unit.numel for unit in units), sizes=sizes, across=across)


@lru_cache(maxsize=256)
def _by_layer(model: ModelSpec) -> dict[int, list[Tensor]]:
    found: dict[int, list[Tensor]] = {}
    for tensor in tensors(model):
        found.setdefault(tensor.layer, []).append(tensor)
    return found


@lru_cache(maxsize=1024)
def _sizes(model: ModelSpec, tensor: int, split: int, joined: bool) -> dict[int, list[Sizes]]:
    """Of each layer the sizes of the dense part split over `tensor` ranks, then of the routed experts split
    over `split`, where there are any. joined: every rank has the projection before an MTP layer whole."""
    found: dict[int, list[Sizes]] = {}
    for layer, mine in _by_layer(model).items():
        if joined:
            mine = [replace(t, whole=True) if t.name.endswith(PROJECTION) else t for t in mine]
        routed = tuple(t.numel // split for t in mine if t.routed)
        found[layer] = [_held([t for t in mine if not t.routed], tensor)]
        if routed:
            found[layer].append(routed)
    return found


def _held(mine: list[Tensor], split: int) -> Sizes:
    return tuple(t.numel // (1 if t.whole or len(t.shape) == 1 else split) for t in mine)


PROJECTION = ".projection.weight"
"""That before the layer of an MTP module."""


@lru_cache(maxsize=1024)
def module_tensors(model: ModelSpec, layer: int, routed: bool) -> int:
    """Parameters of a layer whose projections are joined: of a routed expert, or of all the rest."""
    return len({joined_name(tensor.name) for tensor in _by_layer(model)[layer] if tensor.routed == routed})


def joined_name(name: str) -> str:
    """The name of the tensor that a parameter is part of where projections of one input are joined."""
    for whole, parts in JOINED.items():
        for part in parts:
            name = name.replace(f".{part}", f".{whole}")
    return name


def of_component(model: ModelSpec, layer: int, component: str) -> int:
    """Parameters of a component of a layer, whole."""
    return sum(tensor.numel for tensor in _by_layer(model)[layer] if tensor.component == component)


def whole_numel(model: ModelSpec, layer: int, *, projection: bool) -> int:
    """Parameters of a layer (-1: outside of one), experts apart, that each rank of a tensor group has whole.
    projection: that before an MTP layer too."""
    return sum(
        tensor.numel
        for tensor in _by_layer(model).get(layer, [])
        if tensor.whole
        or (len(tensor.shape) == 1 and split_dim(tensor.name) is None)
        or (projection and tensor.name.endswith(PROJECTION))
    )


def layer_units(
    model: ModelSpec, strategy: Strategy, sharding: Sharding, layer: int, *, apart: int
) -> list[ShardedUnit]:
    """Units of a decoder (or MTP) layer: dense parameters, then the rank's routed experts, of which so many
    (`apart`) have parameters of their own."""
    split = strategy.experts.expert_parallel * strategy.experts.expert_tensor_parallel
    whole, even = sharding.mtp_projection == "whole", sharding.expert_dim == "even"
    dense, *routed = _sizes(model, strategy.dense.tensor_parallel, split, whole)[layer]
    found = [_dense(strategy, f"layers.{layer}.dense", "attention", layer, dense)]
    for sizes in routed:
        found.append(
            ShardedUnit(
                f"layers.{layer}.experts", "experts", layer, sum(sizes),
                strategy.experts.expert_fsdp, strategy.expert_replicas, "expert_shard", "expert_replicas",
                tuple(size // apart for size in sizes) * apart,
                _across(model, strategy, layer, sizes) if even else (),
            )
        )  # fmt: skip
    return found


def _across(model: ModelSpec, strategy: Strategy, layer: int, sizes: Sizes) -> Sizes:
    """Those of a layer's routed parameters that are not sharded along their experts."""
    local, degree = model.num_local_experts // strategy.experts.expert_parallel, strategy.experts.expert_fsdp
    shapes = [(local, *t.shape[1:]) for t in _by_layer(model)[layer] if t.routed]
    return tuple(size for size, shape in zip(sizes, shapes, strict=True) if even_dim(shape, degree))


def all_layer_units(
    model: ModelSpec, strategy: Strategy, sharding: Sharding, *, apart: int
) -> dict[int, list[ShardedUnit]]:
    """`layer_units` of every layer."""
    count = model.num_hidden_layers + model.num_nextn_predict_layers
    return {layer: layer_units(model, strategy, sharding, layer, apart=apart) for layer in range(count)}


def edge_units(
    model: ModelSpec, strategy: Strategy, *, whole: bool = False, apart: bool = False
) -> dict[str, ShardedUnit]:
    """Units outside the layers: embedding (whole: on every tensor rank), final norm, head (absent when
    tied). apart: learned positions, beside the embedding, are one too."""
    by_name = {tensor.name: tensor for tensor in _by_layer(model)[-1]}
    found, split = {}, strategy.dense.tensor_parallel
    embedding = [t for name, t in by_name.items() if "embedding" in name]
    rows = "embedding" if model.tie_word_embeddings else "head"
    positions = [embedding.pop()] if apart and len(embedding) > 1 else []
    found["embedding"] = _dense(
        strategy, "embedding", "embedding", -1, _held(embedding, 1 if whole else split)
    )
    if positions:
        found["positions"] = _dense(strategy, "positions", "embedding", -1, _held(positions, split))
    final = [t for name, t in by_name.items() if name.startswith("final_norm")]
    found["final"] = _dense(strategy, "final", "vocabulary", -1, _held(final, split))
    if "head.weight" in by_name:
        found["head"] = _dense(strategy, "head", "vocabulary", -1, _held([by_name["head.weight"]], split))
    if strategy.vocabulary.loss == "ring":
        found[rows] = _of_ring(model, strategy, found[rows])
    return found


def looked_up(edges: dict[str, ShardedUnit]) -> list[ShardedUnit]:
    """Units of a token's rows: the embedding, and learned positions where they are one."""
    return [edges[name] for name in ("embedding", "positions") if name in edges]


def vocabulary_matrix(embedding: ShardedUnit) -> int:
    """Numbers of the embedding's matrix in its unit, whose last tensor learned positions are."""
    return embedding.numel - embedding.last * (embedding.tensors > 1)


def _of_ring(model: ModelSpec, strategy: Strategy, unit: ShardedUnit) -> ShardedUnit:
    """The vocabulary's matrix split over the ranks of a ring."""
    degree = strategy.vocabulary.vocab_parallel
    numel, copies = ceil_div(model.vocab_size, degree) * model.hidden_size, strategy.stage_ranks // degree
    return structs.replace(
        unit, numel=numel, sizes=(numel,), shard=copies, copies=copies, group="vocabulary_shard", replicas=""
    )  # fmt: skip


def _dense(strategy: Strategy, name: str, component: str, layer: int, sizes: Sizes) -> ShardedUnit:
    return ShardedUnit(
        name, component, layer, sum(sizes), strategy.dense.fsdp, strategy.dense_replicas, "dense_shard",
        "dense_replicas", sizes,
    )  # fmt: skip


def owned_numels(units: Sequence[ShardedUnit]) -> list[int]:
    """Parameters of each unit that the busiest owner has where tensors are given away whole, the largest
    first, each to the rank with the least so far: as many as an even share, or the largest tensor."""
    groups: dict[str, list[ShardedUnit]] = {}
    for unit in units:
        groups.setdefault(unit.group, []).append(unit)
    most = {}
    for name, some in groups.items():
        even = sum(unit.numel for unit in some) / some[0].shard
        most[name] = max(1.0, max(unit.largest for unit in some) / even) / some[0].shard
    return [math.ceil(unit.numel * most[unit.group]) for unit in units]
