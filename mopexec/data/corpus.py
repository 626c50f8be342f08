"""Text to train on: a file or directory the user names, or what ships with Python itself."""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mopexec.data.documents import DocumentPiece, DocumentReading, is_records
from mopsim.common.errors import MopError
from mopsim.common.io import exists

#: Stands for the text that ships with Python: its documentation topics and the sources of its library.
PYTHON = "python"

OF_IDS = (".npy", ".bin", ".idx")
"""Suffixes of files of token ids."""

_PIECE_CHARACTERS = 1 << 20
_PYTHON_BYTES = 6_000_000
_SKIPPED = {
    "__pycache__",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
}


@dataclass(frozen=True)
class Corpus:
    """Files of `source` in a fixed order, and the digest of their contents (hex, 16 digits)."""

    source: str
    files: tuple[Path, ...]
    digest: str

    def check_same(self) -> None:
        """Refuse contents that are not those of the digest any more. Raises MopError."""
        if read_corpus(self.source) != self:
            raise MopError(f"--data: {self.source} was changed while it was read")

    def pieces(self, reading: DocumentReading) -> Iterator[DocumentPiece]:
        """All documents. Raises MopError naming the file and the line or row."""
        for path in self.files:
            try:
                yield from reading.pieces(path)
            except OSError as error:
                raise MopError(f"--data: {path}: {error.strerror or error}") from None


def read_corpus(source: str) -> Corpus:
    """The corpus that `source` names: PYTHON, a file, or a directory (its files, hidden ones apart, by name).

    Raises MopError, naming the path, for what is missing, empty, binary or unreadable.
    """
    files = _python_files() if source == PYTHON else user_files(Path(source))
    digest, size = hashlib.sha256(), 0
    for path in files:
        size += _add_records(digest, path) if is_records(path) else _add_text(digest, path)
    if size == 0:
        raise MopError(f"--data: {source} is empty")
    return Corpus(source, tuple(files), digest.hexdigest()[:16])


def _python_files() -> list[Path]:
    """Documentation first, then the library's sources by name, until the cap is reached."""
    root = Path(sysconfig.get_paths()["stdlib"])
    topics = root / "pydoc_data" / "topics.py"
    sources = [path for path in _walk(root, ".py") if path != topics]
    chosen, size = [], 0
    for path in [topics, *sources]:
        if path.is_file() and (content := path.stat().st_size):
            if size + content > _PYTHON_BYTES:
                continue
            chosen.append(path)
            size += content
    if not chosen:
        raise MopError(f"--data: Python's library at {root} has no sources; name a file or directory of text")
    return chosen


def user_files(path: Path) -> list[Path]:
    """The file, or those of a directory by name. Raises MopError where there are none."""
    if not exists(path):
        raise MopError(f"--data: {path}: no such file or directory")
    check_regular(path)
    if not path.is_dir():
        return [path]
    files = _walk(path, "")
    if not files:
        raise MopError(f"--data: {path} is an empty directory")
    ids = next((file for file in files if file.suffix in OF_IDS), None)
    if ids is not None:
        rule = "of a directory only text and records are read; name the file, or a mixture of such files"
        raise MopError(f"--data: {ids} holds token ids: {rule}")
    return files


def check_regular(path: Path) -> None:
    """Refuse a pipe or a device, which gives its bytes once: data is read to name it, then for its tokens.
    Raises MopError."""
    if exists(path) and not (path.is_file() or path.is_dir()):
        raise MopError(f"--data: {path} is not a regular file, and it is read more than once")


def _walk(root: Path, suffix: str) -> list[Path]:
    """Regular files below `root` by name; hidden ones, and with a suffix (a library) tests and caches, left
    out. What is left out is not looked through: a library may have tens of thousands of packages' files.
    """
    skipped = _SKIPPED if suffix else {"__pycache__"}
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if not name.startswith(".") and name not in skipped]
        some = (Path(folder, name) for name in names if name.endswith(suffix) and name not in skipped)
        found += [path for path in some if not path.name.startswith(".") and path.is_file()]
    return sorted(found)


def _add_text(digest: "hashlib._Hash", path: Path) -> int:
    """Check one file, add it to the digest, return its bytes."""
    size = 0
    try:
        with path.open(encoding="utf-8", newline="") as file:
            while text := file.read(_PIECE_CHARACTERS):
                if "\0" in text:
                    raise MopError(f"--data: {path} is binary, UTF-8 text is needed")
                content = text.encode()
                digest.update(content)
                size += len(content)
    except UnicodeDecodeError:
        raise MopError(f"--data: {path} is binary or not UTF-8 text") from None
    except OSError as error:
        raise MopError(f"--data: {path}: {error.strerror or error}") from None
    digest.update(b"\0")
    return size


def _add_records(digest: "hashlib._Hash", path: Path) -> int:
    """Add a file of records to the digest, return its bytes."""
    try:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
            return file.tell()
    except OSError as error:
        raise MopError(f"--data: {path}: {error.strerror or error}") from None
