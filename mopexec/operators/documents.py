"""Documents packed into one sequence: positions restart with each, and attention does not leave it."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

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
    return torch.from_numpy(np.stack(rows)).to(device)


def cumulative(documents: Documents, device: torch.device) -> tuple[Tensor, int]:
    """(ends of all documents in the sequences laid one behind the other, from 0 on, int32; the longest)."""
    lengths = np.concatenate([np.diff(ends, prepend=0) for ends in documents])
    ends = torch.from_numpy(np.cumsum(lengths, dtype=np.int32))
    return torch.nn.functional.pad(ends, (1, 0)).to(device), int(lengths.max())
