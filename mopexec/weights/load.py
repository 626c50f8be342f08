"""Parameters filled from a source: those of a whole model, or the block that a rank holds."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from mopexec.model.initialize import is_stacked
from mopexec.weights.source import Source


@torch.no_grad()
def fill(model: nn.Module, source: Source) -> None:
    """Every parameter and buffer of `model`, in place."""
    for name, parameter in model.named_parameters():
        fill_block(parameter, name, tuple(parameter.shape), [0] * parameter.dim(), source)
    for name, buffer in model.named_buffers():
        value = source.buffer(name)
        if value is not None:
            buffer.copy_(value)


@torch.no_grad()
def fill_block(
    target: Tensor, name: str, shape: tuple[int, ...], start: Sequence[int], source: Source
) -> None:
    """`target` becomes the elements from `start` on of a parameter of `shape`."""
    for row, values in matrices(name, shape, start, target.shape, source):
        (target if row is None else target[row]).copy_(values)


def matrices(
    name: str, shape: tuple[int, ...], start: Sequence[int], size: Sequence[int], source: Source
) -> Iterator[tuple[int | None, Tensor]]:
    """The block [start, start + size) of a parameter of `shape`, cut in one dimension of each matrix at most,
    one matrix at a time with its place in the block's stack; None and all of it where it is not stacked. In
    the source's dtype, on the CPU.
    """
    if not is_stacked(name):
        yield None, source.read(name, shape, None, *_cut(shape, start, size))
        return
    part = _cut(shape[1:], start[1:], size[1:])
    for row in range(size[0]):
        yield row, source.read(name, shape[1:], start[0] + row, *part)


def _cut(shape: Sequence[int], start: Sequence[int], size: Sequence[int]) -> tuple[int, int, int]:
    """(dim, start, stop) of a block that is smaller than `shape` in one dimension or in none."""
    dim = next((dim for dim, held in enumerate(size) if held < shape[dim]), 0)
    return dim, start[dim], start[dim] + size[dim]
