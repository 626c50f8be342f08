"""Which block of each parameter a rank holds, and who else holds it."""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from mopexec.distributed.mesh import Group, Mesh
from mopexec.model.initialize import is_stacked
from mopexec.run.shards import ParameterPieces, boxes
from mopsim.spec import layout
from mopsim.spec.tensors import split_dim

Kind = Literal["split", "whole", "experts"]
"""Held by the ranks at one tensor place, by all ranks of a stage, or by the replicas of an expert."""


@dataclass(frozen=True)
class Block:
    """Elements [start, start + size) in each dimension of a parameter of `shape`."""

    kind: Kind
    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]


def block_of(name: str, shape: tuple[int, ...], groups: Mesh) -> Block:
    """This rank's block of the parameter `name` of `shape`."""
    cuts: dict[int, tuple[int, int]] = {}
    kind: Kind = "whole"
    if is_stacked(name):
        kind, inner = "experts", 1 if "down_proj" in name else len(shape) - 1
        cuts = {0: (groups.experts.size, groups.experts.place)}
        if not name.endswith("down_proj_bias"):
            cuts[inner] = (groups.expert_tensor.size, groups.expert_tensor.place)
    elif (dim := split_dim(name)) is not None and groups.tensor.size > 1:
        kind, cuts = "split", {dim: (groups.tensor.size, groups.tensor.place)}
    bounds = [layout.interval(size, *cuts.get(dim, (1, 0))) for dim, size in enumerate(shape)]
    return Block(kind, shape, tuple(a for a, _ in bounds), tuple(b - a for a, b in bounds))


def part_of(block: Block, dim: int, group: Group) -> Block:
    """This rank's part of a block that the ranks of a group cut in dimension `dim`, as torch's FSDP2 does."""
    first, stop = layout.interval(block.size[dim], group.size, group.place)
    start, size = list(block.start), list(block.size)
    start[dim], size[dim] = start[dim] + first, stop - first
    return replace(block, start=tuple(start), size=tuple(size))


def pieces(block: Block, values: Tensor, start: int = 0) -> ParameterPieces:
    """What `values` are, from the element `start` on of a block's flat order, of the whole parameter."""
    found = boxes(values.view(-1), start, block.size, block.start)
    return ParameterPieces.of(list(found), block.shape, values)
