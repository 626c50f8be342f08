"""The device meshes that torch's FSDP2 shards over, of the groups of the one mesh
(`mopexec.distributed.mesh`)."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mopexec.distributed.mesh import Group, Mesh, dense_holders, expert_holders, lone_group
from mopexec.distributed.tiers import Platform
from mopsim.spec import layout
from mopsim.spec.strategy import Strategy


@dataclass(frozen=True)
class FsdpMeshes:
    """Of this rank: the mesh that shards (1-d), or that replicates and shards (2-d, HSDP), what it holds of
    dense modules and of experts."""

    dense: DeviceMesh
    experts: DeviceMesh

    @classmethod
    def of(cls, strategy: Strategy, mesh: Mesh, platform: Platform) -> "FsdpMeshes":
        """Collective over all ranks, which make the same groups."""
        single = 1 in (strategy.dense.fsdp, strategy.experts.expert_fsdp)
        alone = lone_group(dist.get_rank(), platform) if single else None

        def device_mesh(shard: Group, replicas: Group, holders: list[list[int]]) -> DeviceMesh:
            kind, inner = platform.device.type, shard.handle or alone
            assert inner is not None
            if replicas.handle is None:
                return DeviceMesh.from_group(inner, kind)
            first = dist.get_rank() - dist.get_rank() % strategy.stage_ranks
            mine = next(ranks for ranks in holders if dist.get_rank() - first in ranks)
            ranks = torch.tensor(layout.split([first + one for one in mine], shard.size))
            names = ("replicate", "shard")
            return DeviceMesh.from_group([replicas.handle, inner], kind, ranks, mesh_dim_names=names)

        return cls(
            device_mesh(mesh.dense_shard, mesh.dense_replicas, dense_holders(strategy)),
            device_mesh(mesh.expert_shard, mesh.expert_replicas, expert_holders(strategy)),
        )
