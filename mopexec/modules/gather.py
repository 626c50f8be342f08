"""Whole tensors from FSDP2's shards: for tests and export, and as global DTensors for checkpoints."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from mopexec.distributed import collectives
from mopexec.distributed.tiers import Platform
from mopexec.measure.scope import host_compute
from mopsim.spec import layout
from mopsim.spec.strategy import Strategy


class Gathered:
    """Puts parameters (or anything sharded like them) together on every rank, one all-gather over the world
    each."""

    def __init__(self, strategy: Strategy, platform: Platform) -> None:
        self._platform = platform
        self._world = strategy.world_size
        self._dense = [list(range(strategy.dense.fsdp))]
        replicas = layout.replica_groups(
            self._world, strategy.experts.expert_parallel, strategy.experts.rank_placement
        )
        self._experts = [row[: strategy.experts.expert_fsdp] for row in replicas]

    def whole(self, name: str, parameter: Any, shard: Tensor | None) -> Tensor:
        """The full tensor of `parameter` from this rank's `shard` (None: this rank has none, as of a padded
        rest)."""
        rows = self._experts if ".experts." in name else self._dense
        dim, shape = parameter.placements[-1].dim, list(parameter.shape)
        sizes = [
            stop - start
            for start, stop in (layout.interval(shape[dim], len(rows[0]), i) for i in range(len(rows[0])))
        ]
        padded = [*shape[:dim], sizes[0], *shape[dim + 1 :]]
        sent = torch.zeros(padded, dtype=parameter.dtype, device=self._platform.device)
        if shard is not None and shard.numel():
            with host_compute():
                sent.narrow(dim, 0, shard.shape[dim]).copy_(shard)
        everyone = torch.empty([self._world, *padded], dtype=sent.dtype, device=sent.device)
        collectives.all_gather_single(everyone.view(-1, *padded[1:]), sent)
        copies = [
            torch.cat(
                [everyone[rank].narrow(dim, 0, size) for rank, size in zip(row, sizes, strict=True)], dim
            )
            for row in rows
        ]
        return torch.cat(copies)


def global_dtensor(parameter: DTensor, value: Tensor, experts: DeviceMesh | None) -> DTensor:
    """`value`, sharded like `parameter`, as a DTensor of the model's global shape that shares its storage.

    experts: the mesh [Ep, copies, shard] of an expert stack, whose FSDP DTensor knows only this rank's
    experts.
    """
    if experts is None:
        return _wrap(value, parameter.device_mesh, parameter.placements, tuple(parameter.shape))
    shape = (parameter.shape[0] * experts.size(0), *parameter.shape[1:])
    return _wrap(value, experts, (Shard(0), Replicate(), parameter.placements[-1]), shape)


def _wrap(value: Tensor, mesh: DeviceMesh, placements: Any, shape: tuple[int, ...]) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    checked: tuple[Placement, ...] = tuple(placements)
    return DTensor.from_local(value, mesh, checked, run_check=False, shape=torch.Size(shape), stride=stride)
