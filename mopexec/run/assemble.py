"""Full tensors from all ranks' shards, on every rank: for tests and export, not for training."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mopexec.distributed.mesh import Mesh
from mopexec.flat.units import Contents, Unit

Piece = tuple[int, Tensor]


def full(units: Sequence[Unit], values: Sequence[Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """Every parameter's full value by name, on the CPU, from flat shards `values` laid out as the units'."""
    own: dict[str, Piece] = {}
    for unit, value in zip(units, values, strict=True):
        start = unit.contents.global_start + unit.start
        own[unit.contents.key] = (start, value[: unit.valid].detach().cpu())
    everyone: list[Any] = [own]
    if mesh.world.size > 1:
        everyone = [None] * mesh.world.size
        dist.all_gather_object(everyone, own)
    found: dict[str, Tensor] = {}
    for unit in units:
        pieces = [rank[unit.contents.key] for rank in everyone]
        found.update(_assemble(unit.contents, pieces))
    return found


def _assemble(contents: Contents, pieces: Sequence[Piece]) -> dict[str, Tensor]:
    flat = torch.empty(contents.global_numel, dtype=pieces[0][1].dtype)
    for start, piece in pieces:
        flat[start : start + piece.numel()].copy_(piece)
    whole = Contents(
        contents.key, contents.names, stack=contents.total_stack, total_stack=contents.total_stack
    )
    return {name: view.contiguous() for name, view in whole.views(flat).items()}
