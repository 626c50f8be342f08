"""Where a file or a directory is written before it takes its place: beside it, under a name of its own.

A program that is killed leaves what it was writing. The next one that writes to the same place removes that:
a lock, which ends with its process, tells it from what another one is writing now.
"""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MOST = 200
"""Bytes of the target's name that are kept: the system allows names of 255."""


@contextmanager
def aside(target: Path, *, directory: bool = False) -> Iterator[Path]:
    """An empty file, or a directory, beside `target`, that only its owner reads; removed with what is in it
    unless the body moved it. Raises OSError where there can be none."""
    head = os.fsdecode(os.fsencode(f".{target.name}")[:MOST])
    _sweep(target.parent, head)
    place, lock = target, -1
    try:
        while lock < 0:
            place = target.with_name(f"{head}.{secrets.token_hex(4)}.part")  # known before it is there
            lock = _made(place, directory)
        yield place
    finally:
        if place != target:
            _remove(place)
        if lock >= 0:
            os.close(lock)


def _made(place: Path, directory: bool) -> int:
    """Make it and lock it: the open lock, -1 where another program took it for left over meanwhile."""
    if directory:
        place.mkdir(mode=0o700)
        lock = os.open(place, os.O_RDONLY)
    else:
        lock = os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    with suppress(OSError):  # a system without locks, where nothing is swept
        fcntl.flock(lock, fcntl.LOCK_EX)
    if place.exists():
        return lock
    os.close(lock)
    return -1


def _sweep(folder: Path, head: str) -> None:
    """Remove what programs that are gone have left."""
    left = re.compile(rf"{re.escape(head)}\.[0-9a-f]{{8}}\.part")
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in [one.path for one in entries if left.fullmatch(one.name)]:
            with suppress(OSError):  # another program's, or gone meanwhile
                lock = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(Path(entry))
                finally:
                    os.close(lock)


def _remove(place: Path) -> None:
    """What is there, if anything; what cannot be removed stays."""
    with suppress(OSError):
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink()
