"""The device meshes of the `fully_shard` runtime, from the layout's rank groups."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from mopexec.distributed.mesh import Group
from mopexec.distributed.tiers import Platform
from mopexec.model.initialize import is_stacked
from mopsim.spec import layout
from mopsim.spec.strategy import Strategy


@dataclass(frozen=True)
class FsdpGroups:
    """Views of the W ranks, from this rank.

    dense, experts: the mesh that shards (1-d), or that replicates and shards (2-d, HSDP). experts_whole:
    [Ep, copies, shard]. expert_copies: copies of each expert shard in the world. experts_spread: the Ep ranks
    that trade tokens. sequence: the D ranks of a sequence.
    """

    world: int
    dense: DeviceMesh
    experts: DeviceMesh
    experts_whole: DeviceMesh
    experts_spread: Group
    expert_copies: int
    sequence: Group

    def global_dtensor(self, name: str, parameter: DTensor, value: Tensor) -> DTensor:
        """`value`, sharded like `parameter`, as a DTensor of the model's global shape on the same storage:
        FSDP's of an expert stack knows only this rank's experts.
        """
        mesh, placements, shape = parameter.device_mesh, parameter.placements, tuple(parameter.shape)
        if is_stacked(name):
            mesh, placements = self.experts_whole, (Shard(0), Replicate(), parameter.placements[-1])
            shape = (shape[0] * mesh.size(0), *shape[1:])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            value, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        )


def make_groups(strategy: Strategy, platform: Platform) -> FsdpGroups:
    """Collective over all ranks: every rank makes the same groups in the same order."""
    world, device = strategy.world_size, platform.device.type
    ranks = layout.replica_groups(world, strategy.experts.expert_parallel, strategy.experts.rank_placement)
    experts = _expert_mesh(ranks, strategy.experts.expert_fsdp, device)
    sequences = torch.tensor(
        layout.groups(world, strategy.attention.context_parallel, strategy.attention.rank_placement)
    )
    sequence = DeviceMesh(device, sequences, mesh_dim_names=("data", "sequence"))
    shard = strategy.dense.fsdp
    copies = torch.tensor(layout.split(range(world), shard))
    dense = DeviceMesh(device, copies, mesh_dim_names=("replicate", "shard"))
    return FsdpGroups(
        world=world,
        dense=dense if shard < world else dense["shard"],
        experts=experts["replicate", "shard"]
        if len(ranks[0]) > strategy.experts.expert_fsdp
        else experts["shard"],
        experts_whole=experts,
        experts_spread=_group(experts, "expert"),
        expert_copies=len(ranks[0]) // strategy.experts.expert_fsdp,
        sequence=_group(sequence, "sequence"),
    )


def _group(mesh: DeviceMesh, name: str) -> Group:
    handle = mesh.get_group(name)
    return Group(tuple(dist.get_process_group_ranks(handle)), mesh.get_local_rank(name), handle)


def _expert_mesh(replicas: list[list[int]], shard: int, device: str) -> DeviceMesh:
    """[Ep, copies, shard]: row p holds the ranks with the experts of place p, cut into runs that share one
    copy."""
    ranks = torch.tensor([layout.split(row, shard) for row in replicas])
    return DeviceMesh(device, ranks, mesh_dim_names=("expert", "replicate", "shard"))
