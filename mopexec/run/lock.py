"""One run at a time in a directory."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from mopsim.common.errors import MopError

NAME = ".lock"
PATIENCE = 5.0
"""Seconds until another run is said to hold the directory: the processes of one that was killed a moment ago
let go once the system has ended them."""


@contextlib.contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Hold `directory` for this run; a process that ends lets go, however it ends. Raises MopError where
    another holds it for PATIENCE seconds."""
    path, end = directory / NAME, time.monotonic() + PATIENCE
    while (file := _taken(path)) is None:
        if time.monotonic() > end:
            raise MopError(f"--out: {directory} is in use by another run")
        time.sleep(0.05)
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _taken(path: Path) -> TextIO | None:
    """The file, held; None where another run holds it, or took it along after we had opened it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise MopError(f"--out: {path} cannot be written: {error.strerror or error}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_nlink:
            return file
    except BlockingIOError:
        pass
    except OSError as error:
        file.close()
        raise MopError(f"--out: {path} cannot be locked: {error.strerror or error}") from None
    file.close()
    return None
