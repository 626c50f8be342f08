"""Documents packed into one sequence: positions restart with each, and attention does not leave it."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mopexec.measure.scope import uncounted

Documents = tuple[tuple[int, ...], ...]
"""Where the documents of each sequence of a microbatch end, in whole sequences (not a rank's slice); the last
end is the sequence's. () where a sequence is trained as one.
"""


def spans(documents: Documents) -> Iterator[tuple[slice, slice]]:
    """(sequence, positions) of each document, to index [B, S, ..] with."""
    for row, ends in enumerate(documents):
        for start, stop in zip((0, *ends[:-1]), ends, strict=True):
            yield slice(row, row + 1), slice(start, stop)


def positions(documents: Documents, start: int, stop: int, device: torch.device) -> Tensor:
    """Position of each token in its document, [B, stop - start] int64, of positions [start, stop) of each
    sequence.
    """
    rows = []
    for ends in documents:
        lengths = np.diff(ends, prepend=0)
        starts = np.repeat(np.array(ends) - lengths, lengths)
        rows.append((np.arange(ends[-1]) - starts)[start:stop])
    return _upload(np.stack(rows), device)


@functools.lru_cache(maxsize=2)
def cumulative(documents: Documents, device: torch.device) -> tuple[Tensor, int]:
    """(ends of all documents in the sequences laid one behind the other, from 0 on, int32; the longest): the
    same for every layer that asks.
    """
    lengths = np.concatenate([np.diff(ends, prepend=0) for ends in documents])
    return _upload(np.cumsum(np.append(0, lengths), dtype=np.int32), device), int(lengths.max())


def _upload(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Numbers of the host on the device; on a GPU by a pinned copy, for which the host does not wait."""
    host = torch.from_numpy(values)
    if device.type != "cuda":
        return host.to(device)
    with uncounted():
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
