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
    """The block [start, start + size) of a parameter of `shape`, one matrix at a time with its place in the
    block's stack; None and all of it where it is not stacked. In the source's dtype, on the CPU.
    """
    if not is_stacked(name):
        yield None, _read(source, name, shape, None, start, size)
        return
    for row in range(size[0]):
        yield row, _read(source, name, shape[1:], start[0] + row, start[1:], size[1:])


def _read(
    source: Source, name: str, shape: tuple[int, ...], index: int | None, start: Sequence[int],
    size: Sequence[int],
) -> Tensor:  # fmt: skip
    """A block of a matrix: the source is asked for its part along the first dimension that is cut."""
    cuts = [dim for dim, held in enumerate(size) if held < shape[dim]] or [0]
    first, rest = cuts[0], cuts[1:]
    found = source.read(name, shape, index, first, start[first], start[first] + size[first])
    for dim in rest:
        found = found.narrow(dim, start[dim], size[dim])
    return found
