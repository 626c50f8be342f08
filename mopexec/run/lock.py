"""One run at a time in a directory."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from mopsim.common.errors import MopError

NAME = ".lock"


@contextlib.contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Hold `directory` for this run; a process that ends lets go, however it ends. Raises MopError where
    another holds it."""
    path = directory / NAME
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise MopError(f"--out: {path} cannot be written: {error.strerror or error}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ended = os.fstat(file.fileno()).st_nlink == 0  # it took its file along after we had opened it
        except OSError:
            ended = True
        if ended:
            raise MopError(f"--out: {directory} is in use by another run") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
