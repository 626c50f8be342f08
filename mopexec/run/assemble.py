"""Full tensors from all ranks' shards, on every rank: for tests and export, not for training."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mopexec.distributed.collectives import parts_of_all
from mopexec.distributed.mesh import Mesh
from mopexec.flat.units import Contents, Unit

Piece = tuple[int, Tensor]


def full(units: Sequence[Unit], values: Sequence[Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """Every parameter's full value by name, on the CPU, from flat shards `values` laid out as the units'."""
    starts = [unit.contents.global_start + unit.start for unit in units]
    own = [value[: unit.valid].detach().cpu() for unit, value in zip(units, values, strict=True)]
    everyone = parts_of_all(starts, own) if mesh.world.size > 1 else [(starts, own)]
    found: dict[str, Tensor] = {}
    for place, unit in enumerate(units):  # the same on every rank
        found.update(_assemble(unit.contents, [(told[place], parts[place]) for told, parts in everyone]))
    return found


def _assemble(contents: Contents, pieces: Sequence[Piece]) -> dict[str, Tensor]:
    flat = torch.empty(contents.global_numel, dtype=pieces[0][1].dtype)
    for start, piece in pieces:
        flat[start : start + piece.numel()].copy_(piece)
    whole = Contents(
        contents.key, contents.names, stack=contents.total_stack, total_stack=contents.total_stack
    )
    return {name: view.contiguous() for name, view in whole.views(flat).items()}
