"""Batches from a directory of tokens, in an order that only the seed and the index decide."""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mopexec.data.prepare import TextPart, naming, read_meta
from mopexec.data.source_order import SourceOrder
from mopexec.data.token_files import stamp_of
from mopexec.data.tokenizer import TOKENIZER, digest
from mopsim.common.errors import MopError
from mopsim.spec.training import TrainSpec

IGNORED = -100
"""Target of a token that does not count in the loss; torch's `ignore_index`."""

Ids = npt.NDArray[np.int64]
T = TypeVar("T", bound="TokenDataset")


class TokenDataset:
    """Sequences of `seq_len` tokens and their targets. Each source is cut into windows of seq_len tokens; the
    order of its windows is a fresh permutation an epoch of that source. apart: the documents of a window are
    trained apart: none predicts the next one's first token.
    """

    def __init__(self, directory: Path, seq_len: int, seed: int, apart: bool = False) -> None:
        meta = read_meta(directory)
        self.vocab_size, self.text_digest = meta.vocab_size, meta.digest
        own = directory / TOKENIZER
        self.tokenizer_digest = digest(own.read_bytes()) if own.is_file() else ""
        self.seq_len, self.seed, self.apart = seq_len, seed, apart
        self.parts = [
            _Windows(directory, part, seq_len, apart, (seed, place)) for place, part in enumerate(meta.parts)
        ]
        self.masked = apart or any(part.mask is not None for part in self.parts)
        self._sources = SourceOrder([part.weight for part in meta.parts])

    @property
    def num_tokens(self) -> int:
        """Of all sources."""
        return sum(len(part.tokens) for part in self.parts)

    @property
    def num_windows(self) -> int:
        """Sequences of all sources."""
        return sum(part.num_windows for part in self.parts)

    def window(self, index: int) -> tuple[Ids, Ids]:
        """Tokens and targets [seq_len] of sequence `index` of the run (from 0, counted over all steps)."""
        part, start = self._start(index)
        return part.at(start, self.seq_len)

    def documents(self, indices: list[int]) -> tuple[tuple[int, ...], ...]:
        """Where the documents of each of these sequences end; () where they are not trained apart."""
        if not self.apart:
            return ()
        found = (self._start(index) for index in indices)
        return tuple((*part.borders(start, self.seq_len - 1), self.seq_len) for part, start in found)

    def batch(self, indices: list[int], start: int, stop: int) -> tuple[Ids, Ids]:
        """Tokens and targets [len(indices), stop - start]: positions [start, stop) of each sequence."""
        windows = [self.window(index) for index in indices]
        return np.stack([w[0][start:stop] for w in windows]), np.stack([w[1][start:stop] for w in windows])

    def num_targets(self, indices: range) -> int:
        """Tokens of these sequences that count in the loss."""
        if not self.masked:
            return len(indices) * self.seq_len
        return sum(int((self.window(index)[1] != IGNORED).sum()) for index in indices)

    def _start(self, index: int) -> tuple["_Windows", int]:
        """(source, its first token) of a sequence of the run."""
        part, epoch, place = self._place(index)
        return part, int(part.order(epoch)[place]) * self.seq_len

    def _place(self, index: int) -> tuple["_Windows", int, int]:
        """(source, its epoch, window of that epoch) of a sequence of the run."""
        number, earlier = self._sources.place(index)
        return (self.parts[number], *divmod(earlier, self.parts[number].num_windows))


class HeldOut(TokenDataset):
    """Its first `most` sequences, as the shares order them: each window counts once, and what is asked for
    beyond the last one fills a batch and counts nothing.
    """

    def __init__(self, directory: Path, seq_len: int, seed: int, apart: bool, most: int) -> None:
        super().__init__(directory, seq_len, seed, apart)
        self.places = self._sources.once([part.num_windows for part in self.parts], most)
        self.masked |= len(self.places) < most

    def window(self, index: int) -> tuple[Ids, Ids]:
        tokens, targets = super().window(index)
        return tokens, targets if index < len(self.places) else np.full_like(targets, IGNORED)

    def _place(self, index: int) -> tuple["_Windows", int, int]:
        number, window = self.places[min(index, len(self.places) - 1)]
        return self.parts[number], 0, window


def open_tokens(directory: Path, training: TrainSpec, seed: int) -> TokenDataset:
    """The tokens that `training` reads. Raises MopError where they do not say what it needs, or none
    counts.
    """
    apart = training.attention_mask == "document"
    return _counting(TokenDataset(directory, training.seq_len, seed, apart))


def open_held_out(directory: Path, training: TrainSpec, seed: int, most: int) -> HeldOut:
    """As `open_tokens`, of --eval-data; `most`: sequences."""
    apart = training.attention_mask == "document"
    with naming("--eval-data"):
        return _counting(HeldOut(directory, training.seq_len, seed, apart, most))


def _counting(dataset: T) -> T:
    """Refuse data of which no target counts."""
    if dataset.masked and not any(part.counts(dataset.seq_len) for part in dataset.parts):
        raise MopError("--data: no target of it counts in the loss (--loss-mask all counts all)")
    return dataset


class _Windows:
    """One source: its ids, mask and documents' ends, mapped. order: of its windows in an epoch; drawn: the
    seed of these and the source's number.
    """

    def __init__(
        self, directory: Path, part: TextPart, seq_len: int, apart: bool, drawn: tuple[int, int]
    ) -> None:
        self.num_windows = (part.num_tokens - 1) // seq_len
        self.order = lru_cache(maxsize=2)(partial(_order, *drawn, self.num_windows))
        if self.num_windows < 1:
            raise MopError(
                f"--data: the text has {part.num_tokens} tokens, "
                f"too few for one sequence of plan.training.seq_len {seq_len}"
            )
        path = directory / part.tokens  # an absolute path stays itself
        if part.stamp and stamp_of(path) != part.stamp:
            raise MopError(f"--data: {path}: was changed after it was read")
        try:
            self.tokens: npt.NDArray[Any] = np.memmap(
                path, dtype=part.dtype, mode="r", offset=part.offset, shape=(part.num_tokens,)
            )
            self.mask = np.memmap(directory / part.mask, np.uint8, "r") if part.mask else None
            self.ends = np.fromfile(directory / part.ends, np.int64) if part.ends and apart else None
        except (OSError, ValueError):
            raise MopError(
                f"{path}: is missing or cut short; delete {directory} to have it made again"
            ) from None
        if apart and self.ends is None:
            raise MopError(
                f"--data: {path} does not say where documents end, as plan.training.attention_mask "
                "'document' needs; text, records and Megatron's .bin with its .idx do"
            )

    def borders(self, start: int, length: int) -> list[int]:
        """Ends of documents in (start, start + length], counted from start."""
        assert self.ends is not None
        first, last = np.searchsorted(self.ends, (start, start + length), side="right")
        found: list[int] = (self.ends[first:last] - start).tolist()
        return found

    def counts(self, seq_len: int) -> bool:
        """Whether any target counts in the loss."""
        starts = range(0, self.num_windows * seq_len, seq_len)
        return any((self.at(start, seq_len)[1] != IGNORED).any() for start in starts)

    def at(self, start: int, length: int) -> tuple[Ids, Ids]:
        """Tokens and targets [length] from token `start` on."""
        text = np.asarray(self.tokens[start : start + length + 1], dtype=np.int64)
        targets = text[1:]
        if self.mask is not None:
            counted = np.asarray(self.mask[start + 1 : start + length + 1], dtype=bool)
            targets = np.where(counted, targets, IGNORED)
        if self.ends is not None:
            targets = targets.copy()
            targets[[end - 1 for end in self.borders(start, length)]] = IGNORED
        return text[:-1], targets


def _order(seed: int, part: int, num_windows: int, epoch: int) -> npt.NDArray[np.int64]:
    key = (seed, epoch) if part == 0 else (seed, epoch, part)
    return np.random.default_rng(key).permutation(num_windows)


def sequence_indices(
    step: int, microbatch: int, group: int, *, global_batch: int, micro_batch: int, data_groups: int
) -> list[int]:
    """Run-wide indices of the `micro_batch` sequences of one data group's microbatch in one step (all from
    0).

    A step takes the same global_batch sequences however they are spread over groups and microbatches.
    """
    first = step * global_batch + (microbatch * data_groups + group) * micro_batch
    return list(range(first, first + micro_batch))
