"""Training state as intervals of each parameter's flat order, which no runtime and no sharding changes: a
checkpoint loads at another world size, under another strategy and in the other runtime.

Names: `PARAM.value` (master weights where there are any, else the parameter), `PARAM.exp_avg`,
`PARAM.exp_avg_sq`, each [numel]; `ROUTER.balance_bias` [E]; `step`, optimizer steps done.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from mopexec.distributed.collectives import parts_of_all
from mopexec.measure.scope import host_compute

STEP = "step"


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + values.numel()) of a parameter's flat order; `values` is the live memory."""

    start: int
    values: Tensor


class FlatShards(Tensor):
    """Pieces of the flat order of a parameter of shape `whole`, as torch.distributed.checkpoint's protocol.

    A tensor only because the checkpoint code asks for one: use `pieces` for values. `size()` is that of the
    flat order.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    pieces: dict[int, Tensor]
    whole: tuple[int, ...]

    @staticmethod
    def of(pieces: Sequence[Piece], whole: tuple[int, ...], like: Tensor) -> "FlatShards":
        """Loading writes the pieces in place; `like` has their dtype where this rank holds none."""
        shards: FlatShards = torch.Tensor._make_subclass(FlatShards, like.detach())
        shards.pieces = {piece.start: piece.values for piece in pieces if piece.values.numel()}
        shards.whole = whole
        return shards

    def size(self, dim: int | None = None) -> Any:
        flat = torch.Size([math.prod(self.whole)])
        return flat if dim is None else flat[dim]

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


def whole(shards: Mapping[str, FlatShards]) -> dict[str, Tensor]:
    """Full tensors by name, on the CPU, on every rank, of all ranks' pieces: for tests and export."""
    places = [(name, own.whole, start) for name, own in shards.items() for start in own.pieces]
    with host_compute():
        mine = [values.detach().cpu() for own in shards.values() for values in own.pieces.values()]
        full: dict[str, Tensor] = {}
        for told, everything in parts_of_all(places, mine):
            for (name, shape, start), values in zip(told, everything, strict=True):
                if name not in full:
                    full[name] = torch.empty(shape, dtype=values.dtype)
                full[name].view(-1)[start : start + values.numel()] = values
    return full


def runs_within(
    shape: tuple[int, ...], block: tuple[int, ...], offsets: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[int, int, int]]:
    """(place in the whole flat order, place in the block's, elements) of each contiguous run of the elements
    [start, stop) of a `block` at `offsets` in a tensor of `shape`.
    """
    cut = max((dim for dim in range(len(shape)) if block[dim] != shape[dim]), default=0)
    inner = math.prod(shape[cut + 1 :])
    length = block[cut] * inner
    for row in range(start // length, -(-stop // length)) if start < stop else ():
        place, rest = 0, row
        for dim in reversed(range(cut)):
            rest, at = divmod(rest, block[dim])
            place += (offsets[dim] + at) * math.prod(shape[dim + 1 :])
        first, last = max(start, row * length), min(stop, (row + 1) * length)
        yield place + offsets[cut] * inner + first - row * length, first, last - first
