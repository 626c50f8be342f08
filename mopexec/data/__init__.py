"""Data: files into tokens once, and batches in an order that no layout of the ranks changes."""

from mopexec.data.corpus import PYTHON
from mopexec.data.dataset import HeldOut, TokenDataset, open_held_out, open_tokens, sequence_indices
from mopexec.data.prepare import DataOptions, cache_directory, prepare, prepare_all

__all__ = [
    "PYTHON",
    "DataOptions",
    "HeldOut",
    "TokenDataset",
    "cache_directory",
    "open_held_out",
    "open_tokens",
    "prepare",
    "prepare_all",
    "sequence_indices",
]
