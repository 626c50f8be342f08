"""Training state as boxes of each parameter, whose shape no runtime and no sharding changes: a checkpoint
loads at another world size, under another strategy and in the other runtime.

Names: `PARAM.value` (master weights where there are any, else the parameter), `PARAM.exp_avg`,
`PARAM.exp_avg_sq`, each of the parameter's shape; `ROUTER.balance_bias` [E]; `step`, optimizer steps done.
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
Place = tuple[int, ...]
"""Of an element, one number for each dimension."""


@dataclass(frozen=True)
class Piece:
    """A box of a parameter from the element `first` on; `values`, of the box's shape, is the live memory."""

    first: Place
    values: Tensor


def boxes(flat: Tensor, start: int, shape: Place, first: Place) -> Iterator[Piece]:
    """The elements from `start` on of the flat order of a block of `shape`, which begins at `first` in its
    parameter: `flat` has them. In each dimension the end of a row that began before, whole rows, and the
    beginning of one that ends later: 2 D - 1 boxes at most, views of `flat`.
    """
    width = math.prod(shape[1:])
    while flat.numel():
        row, within = divmod(start, width)
        rows = 0 if within else flat.numel() // width
        count = rows * width or min(width - within, flat.numel())
        here, flat, start = flat[:count], flat[count:], start + count
        if rows:
            yield Piece((first[0] + row, *first[1:]), here.view(rows, *shape[1:]))
        else:
            for part in boxes(here, within, shape[1:], first[1:]):
                yield Piece((first[0] + row, *part.first), part.values[None])


def _runs(first: Place, values: Tensor, shape: Place) -> Iterator[tuple[int, Tensor]]:
    """(place in the flat order of a parameter of `shape`, elements) of what a box has side by side in both
    that order and memory."""
    width = math.prod(shape[1:])
    if len(shape) == 1 or (tuple(values.shape[1:]) == shape[1:] and values.is_contiguous()):
        yield first[0] * width, values.view(-1)
        return
    for row, part in enumerate(values, first[0]):
        for place, run in _runs(first[1:], part, shape[1:]):
            yield row * width + place, run


class ParameterPieces(Tensor):
    """What a rank has of a parameter of shape `whole`, as torch.distributed.checkpoint's protocol.

    A tensor only because the checkpoint code asks for one: use `pieces` for values, by their first element.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    pieces: dict[Place, Tensor]
    whole: Place

    @staticmethod
    def of(pieces: Sequence[Piece], whole: Place, like: Tensor) -> "ParameterPieces":
        """Loading writes the pieces in place; `like` has their dtype where this rank holds none."""
        found: ParameterPieces = torch.Tensor._make_subclass(ParameterPieces, like.detach())
        found.pieces = {piece.first: piece.values for piece in pieces if piece.values.numel()}
        found.whole = whole
        return found

    def size(self, dim: int | None = None) -> Any:
        whole = torch.Size(self.whole)
        return whole if dim is None else whole[dim]

    def in_flat_order(self) -> "ParameterPieces":
        """The same memory as intervals of the parameter's flat order, as checkpoints of format 2 have it."""
        runs = (run for first, values in self.pieces.items() for run in _runs(first, values, self.whole))
        return self.of([Piece((place,), run) for place, run in runs], (math.prod(self.whole),), self)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        held = self.pieces.items()
        return [ChunkStorageMetadata(torch.Size(first), values.size()) for first, values in held]

    def __create_write_items__(self, fqn: str, _object: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(self.pieces[chunk.offsets]),
                    size=self.size(),
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.pieces[index.offset]


def whole(parameters: Mapping[str, ParameterPieces]) -> dict[str, Tensor]:
    """Full tensors by name, on the CPU, on every rank, of all ranks' pieces: for tests and export."""
    held = [(name, own.whole, piece) for name, own in parameters.items() for piece in own.pieces.items()]
    places = [(name, shape, first, tuple(values.shape)) for name, shape, (first, values) in held]
    with host_compute():
        mine = [values.detach().cpu() for *_, (_, values) in held]
        full: dict[str, Tensor] = {}
        for told, everything in parts_of_all(places, mine):
            for (name, shape, first, size), values in zip(told, everything, strict=True):
                if name not in full:
                    full[name] = torch.empty(shape, dtype=values.dtype)
                box = tuple(slice(at, at + count) for at, count in zip(first, size, strict=True))
                full[name][box] = values.view(size)
    return full
