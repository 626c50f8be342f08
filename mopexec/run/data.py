"""Tokens and batches: a byte-level BPE trained on the corpus, memory-mapped tokens, batches in a fixed
order.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mopexec.run.corpus import Corpus, read_corpus
from mopsim.common.errors import MopError, SpecError

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # 256 bytes and the end of text
_FORMAT = 1
_TRAINING_PIECES = 4  # of about 1 MiB each: what the BPE learns its merges from


def cache_directory(given: str | None) -> Path:
    """Where tokenised text is kept: what the user gave, or mopexec's place in the XDG cache."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(given) if given else Path(base) / "mopexec"


def prepare(source: str, vocab_size: int, cache: Path) -> Path:
    """Tokenise `source` once and return the directory of its tokens (made aside, then renamed into the
    cache).

    The directory is named after the text's digest and the vocabulary, so another text never meets it.
    Raises MopError for text that cannot be read, SpecError for a vocabulary below 257.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise SpecError(
            "plan.model.vocab_size",
            vocab_size,
            f"is below {SMALLEST_VOCABULARY}, the least for byte-level text",
        )
    corpus = read_corpus(source)
    final = cache / f"tokens-v{_FORMAT}-{corpus.digest}-{vocab_size}"
    if final.is_dir():
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=cache, prefix=".making-"))
    except OSError as error:
        raise MopError(f"--cache: {cache} cannot be written: {error.strerror or error}") from None
    try:
        _tokenise(corpus, vocab_size, aside)
        aside.rename(final)
    except OSError as error:
        if not final.is_dir():  # else another run was faster, with the same content
            why = (
                error.strerror or f"the disk is full or a limit is reached ({error})"
            )  # numpy gives no reason
            raise MopError(f"--cache: {cache} cannot be written: {why}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def _tokenise(corpus: Corpus, vocab_size: int, directory: Path) -> None:
    """Train the BPE, encode the corpus, write tokenizer.json, tokens.bin and meta.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_training_texts(corpus), trainer)
    end = tokenizer.token_to_id(END_OF_TEXT)
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    num_tokens = 0
    with (directory / "tokens.bin").open("wb") as file:
        for batch in _batched(corpus.pieces(), 16):
            encoded = tokenizer.encode_batch([text for text, _ in batch], add_special_tokens=False)
            for piece, (_, ends) in zip(encoded, batch, strict=True):
                ids = np.array(piece.ids + [end] * ends, dtype=dtype)
                ids.tofile(file)
                num_tokens += len(ids)
    tokenizer.save(str(directory / "tokenizer.json"))
    meta = {
        "text_digest": corpus.digest,
        "vocab_size": vocab_size,
        "num_tokens": num_tokens,
        "dtype": np.dtype(dtype).name,
    }
    (directory / "meta.json").write_text(json.dumps(meta))


def _training_texts(corpus: Corpus) -> Iterator[str]:
    """Pieces until about 4 MiB, in order: enough for the merges, bounded in time."""
    room = _TRAINING_PIECES << 20
    for text, _ in corpus.pieces():
        yield text[:room]
        room -= len(text)
        if room <= 0:
            return


def _batched(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(items, size)):
        yield batch


class TokenDataset:
    """Sequences of `seq_len` tokens and their targets, in an order that only the seed and the index decide.

    The text is cut into windows of seq_len tokens; window order is a fresh permutation an epoch.
    """

    def __init__(self, directory: Path, seq_len: int, seed: int) -> None:
        try:
            meta = json.loads((directory / "meta.json").read_text())
            self.tokens: npt.NDArray[Any] = np.memmap(directory / "tokens.bin", dtype=meta["dtype"], mode="r")
        except (OSError, ValueError, KeyError):
            raise MopError(
                f"{directory}: is not a directory of tokens; delete it to have it made again"
            ) from None
        self.vocab_size: int = meta["vocab_size"]
        self.text_digest: str = meta["text_digest"]
        self.seq_len, self.seed = seq_len, seed
        self.num_windows = (len(self.tokens) - 1) // seq_len
        if self.num_windows < 1:
            raise MopError(
                f"--data: the text has {len(self.tokens)} tokens, "
                f"too few for one sequence of plan.training.seq_len {seq_len}"
            )

    def window(self, index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Tokens and targets [seq_len] of sequence `index` of the run (from 0, counted over all steps)."""
        epoch, place = divmod(index, self.num_windows)
        start = int(_order(self.seed, epoch, self.num_windows)[place]) * self.seq_len
        text = np.asarray(self.tokens[start : start + self.seq_len + 1], dtype=np.int64)
        return text[:-1], text[1:]

    def batch(
        self, indices: list[int], start: int, stop: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Tokens and targets [len(indices), stop - start]: positions [start, stop) of each sequence."""
        windows = [self.window(index) for index in indices]
        return np.stack([w[0][start:stop] for w in windows]), np.stack([w[1][start:stop] for w in windows])


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, num_windows: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(num_windows)


def sequence_indices(
    step: int, microbatch: int, group: int, *, global_batch: int, micro_batch: int, data_groups: int
) -> list[int]:
    """Run-wide indices of the `micro_batch` sequences of one data group's microbatch in one step (all from
    0).

    A step takes the same global_batch sequences however they are spread over groups and microbatches.
    """
    first = step * global_batch + (microbatch * data_groups + group) * micro_batch
    return list(range(first, first + micro_batch))
