"""Files that hold token ids already: Megatron's .bin with its .idx, and one-dimensional .npy."""

import hashlib
import json
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mopexec.data.corpus import check_regular
from mopsim.common import io
from mopsim.common.errors import MopError, SpecError
from mopsim.common.io import Spec

_MAGIC = b"MMIDIDX\x00\x00"
_CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}  # 6 and 7 are floats
_SCAN = 1 << 24  # tokens
_SETTLED = 2_000_000_000
"""Nanoseconds after which a file that is written again has another time of change, on every file system."""

Stamp = tuple[int, int]
"""Bytes and time of the last change (ns) of a file."""


class IdsContent(Spec, frozen=True, kw_only=True):
    """What reading all of a file of ids gives. digest: SHA-256 (hex) of their bytes."""

    digest: str
    smallest: int
    largest: int


@dataclass(frozen=True)
class TokenFile:
    """`num_tokens` ids of `dtype` from byte `offset` on of `path`. ends: tokens up to the end of each
    document, None where the file does not say.
    """

    path: Path
    dtype: str
    offset: int
    num_tokens: int
    ends: npt.NDArray[np.int64] | None = None

    def tokens(self) -> npt.NDArray[Any]:
        """The ids [num_tokens], mapped, not read."""
        mapped: npt.NDArray[Any] = np.memmap(
            self.path, dtype=self.dtype, mode="r", offset=self.offset, shape=(self.num_tokens,)
        )
        return mapped

    @property
    def stamp(self) -> Stamp:
        """Of the file as it is now."""
        return stamp_of(self.path)

    @property
    def documents_digest(self) -> str:
        """SHA-256 (hex) of where documents end; "" where the file does not say."""
        return "" if self.ends is None else hashlib.sha256(self.ends.tobytes()).hexdigest()

    def content(self, cache: Path) -> IdsContent:
        """Read once, then known from `cache` by the file's path and status. Raises MopError."""
        status = _status(self.path)
        which = json.dumps([str(self.path), *status, self.dtype, self.offset])
        known = cache / f"ids-{hashlib.sha256(which.encode()).hexdigest()[:16]}.json"
        if io.exists(known):
            with suppress(MopError):
                return io.load(known, IdsContent, "ids")
        found = self._read()
        if _status(self.path) != status:
            raise MopError(f"--data: {self.path} was changed while it was read")
        if time.time_ns() - status[-1] > _SETTLED:
            with suppress(MopError):  # a cache that cannot be written is refused with what it is needed for
                io.write_json(str(known), found)
        return found

    def check(self, vocab_size: int, content: IdsContent) -> None:
        """Refuse an id beyond the vocabulary, with its place. Raises SpecError."""
        if content.smallest >= 0 and content.largest < vocab_size:
            return
        tokens = self.tokens()
        for start in range(0, self.num_tokens, _SCAN):
            part = np.asarray(tokens[start : start + _SCAN])
            wrong = np.flatnonzero((part >= vocab_size) | (part < 0))
            if wrong.size:
                place = start + int(wrong[0])
                raise SpecError(
                    "--data",
                    int(tokens[place]),
                    f"is token {place} of {self.path}, outside plan.model.vocab_size {vocab_size}",
                )

    def _read(self) -> IdsContent:
        digest, tokens, seen = hashlib.sha256(), self.tokens(), list[int]()
        for start in range(0, self.num_tokens, _SCAN):
            part = np.asarray(tokens[start : start + _SCAN])
            seen += [int(part.min()), int(part.max())]
            digest.update(part.tobytes())
        return IdsContent(digest=digest.hexdigest(), smallest=min(seen), largest=max(seen))


def stamp_of(path: Path) -> Stamp:
    """Raises MopError for a file that is not there."""
    return _status(path)[:2]


def _status(path: Path) -> tuple[int, int, int, int]:
    """Bytes, time of the last change (ns), inode, and time (ns) that the file was last put or changed here:
    `cp -p`, tar and rsync carry the first two over from another file, and cannot set the last.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise MopError(f"--data: {path}: {error.strerror or error}") from None
    return found.st_size, found.st_mtime_ns, found.st_ino, found.st_ctime_ns


def open_token_file(path: Path) -> TokenFile | None:
    """The ids in `path`, None where it is text. Raises MopError for a file that is cut short or malformed."""
    check_regular(path)
    try:
        if path.suffix == ".npy":
            return _npy(path)
        if path.suffix in (".bin", ".idx"):
            return _megatron(path.with_suffix(""))
    except OSError as error:
        raise MopError(f"--data: {error.filename or path}: {error.strerror or error}") from None
    return None


def _npy(path: Path) -> TokenFile:
    try:
        with warnings.catch_warnings(action="ignore"):
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # of numpy, its parser of the header, or mmap
        raise MopError(f"--data: {path}: is no .npy file of token ids, or is cut short ({error})") from None
    if (
        not isinstance(mapped, np.memmap)
        or mapped.ndim != 1
        or mapped.dtype.kind not in "iu"
        or not mapped.size
    ):
        raise MopError(f"--data: {path}: is not one dimension of integers, one id or more")
    return TokenFile(path.absolute(), mapped.dtype.str, mapped.offset, mapped.size)


def _megatron(stem: Path) -> TokenFile:
    """An indexed dataset, format version 1: header, lengths (int32) and byte places (int64) of sequences,
    first sequence (int64) of each document and their number. Without the last each sequence is a document.
    """
    index, binary = Path(f"{stem}.idx"), Path(f"{stem}.bin")
    with index.open("rb") as file:
        head = file.read(34)
    if len(head) < 34 or head[:9] != _MAGIC:
        raise MopError(f"--data: {index}: is not an index of Megatron's (its first bytes are others)")
    version, code = int.from_bytes(head[9:17], "little"), head[17]
    count = int.from_bytes(head[18:26], "little")
    dtype = _CODES.get(code, "")
    if version != 1 or not dtype:
        raise MopError(f"--data: {index}: version {version}, type code {code}: not version 1 of integer ids")
    if index.stat().st_size < 34 + 12 * count:
        raise MopError(f"--data: {index}: is cut short: {count} sequences need {34 + 12 * count} bytes")
    lengths = np.fromfile(index, "<i4", count, offset=34).astype(np.int64)
    places = np.fromfile(index, "<i8", count, offset=34 + 4 * count)
    size = np.dtype(dtype).itemsize
    ends = np.cumsum(lengths * size)
    if count == 0 or lengths.min() < 0 or not np.array_equal(places, ends - lengths * size):
        raise MopError(f"--data: {index}: its sequences are not one behind the other")
    if binary.stat().st_size != int(ends[-1]):
        raise MopError(
            f"--data: {binary}: has {binary.stat().st_size} bytes, {index.name} says {int(ends[-1])}: "
            "it is cut short or of another index"
        )
    if ends[-1] == 0:
        raise MopError(f"--data: {binary}: holds no token id")
    firsts = np.fromfile(index, "<i8", -1, offset=34 + 12 * count)
    of = firsts[1:] - 1 if len(firsts) > 1 else np.arange(count)
    if np.any(np.diff(of, prepend=-1) < 0) or of[-1] != count - 1:
        raise MopError(f"--data: {index}: its documents are not its {count} sequences, in order")
    documents = np.unique(ends[of] // size)
    return TokenFile(binary.absolute(), np.dtype(dtype).str, 0, int(ends[-1]) // size, documents)
