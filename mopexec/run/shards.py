"""Training state as intervals of each parameter's flat order, which no runtime and no sharding changes: a
checkpoint loads at another world size, under another strategy and in the other runtime.

Names: `PARAM.value` (master weights where there are any, else the parameter), `PARAM.exp_avg`,
`PARAM.exp_avg_sq`, each [numel]; `ROUTER.balance_bias` [E]; `step`, optimizer steps done.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

STEP = "step"


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + values.numel()) of a parameter's flat order; `values` is the live memory."""

    start: int
    values: Tensor


class FlatShards(Tensor):
    """Pieces of a flat tensor of `total` elements, as torch.distributed.checkpoint's protocol.

    A tensor only because the checkpoint code asks for one: use `pieces` for values. `size()` is that of the
    whole.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    pieces: dict[int, Tensor]
    total: int

    @staticmethod
    def of(pieces: Sequence[Piece], total: int, like: Tensor) -> "FlatShards":
        """Loading writes the pieces in place; `like` has their dtype where this rank holds none."""
        shards: FlatShards = torch.Tensor._make_subclass(FlatShards, like.detach())
        shards.pieces = {piece.start: piece.values for piece in pieces if piece.values.numel()}
        shards.total = total
        return shards

    def size(self, dim: int | None = None) -> Any:
        whole = torch.Size([self.total])
        return whole if dim is None else whole[dim]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size([start]), torch.Size([values.numel()]))
            for start, values in self.pieces.items()
        ]

    def __create_write_items__(self, fqn: str, _object: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(self.pieces[chunk.offsets[0]]),
                    size=self.size(),
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.pieces[index.offset[0]]


def of_dtensor(value: DTensor) -> FlatShards:
    """This rank's block of a DTensor as pieces of its flat order: one for each run of contiguous rows."""
    local, shape = value.to_local(), tuple(value.shape)
    block, offsets = compute_local_shape_and_global_offset(shape, value.device_mesh, value.placements)
    pieces = [Piece(start, values) for start, values in _runs(local, shape, tuple(block), tuple(offsets))]
    return FlatShards.of(pieces, math.prod(shape), local)


def _runs(
    local: Tensor, shape: tuple[int, ...], block: tuple[int, ...], offsets: tuple[int, ...]
) -> Iterator[tuple[int, Tensor]]:
    """(global start, flat view) of each contiguous run of `block` at `offsets` in a tensor of `shape`."""
    if not local.numel():
        return
    cut = max((dim for dim in range(len(shape)) if block[dim] != shape[dim]), default=0)
    inner = math.prod(shape[cut + 1 :])
    flat = local.view(-1, block[cut] * inner)
    for row, leading in enumerate(product(*(range(n) for n in block[:cut]))):
        place = 0
        for dim, at in enumerate(leading):
            place = place * shape[dim] + offsets[dim] + at
        yield (place * shape[cut] + offsets[cut]) * inner, flat[row]
