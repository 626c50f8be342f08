"""One field wrong in every kind of file: one printable line that names the field, and never a traceback.

MOP_FUZZ=1 tries every value in every field; the usual run draws some for each (seeded).
"""

import json
import os
import random
import re
import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path as File
from types import FrameType
from typing import Any, TypeVar

import pytest

from mopsim.common.errors import MopError
from tests.property.malformed import KINDS, MALFORMED, ODD, Kind, Path, Raw, put, without, write

T = TypeVar("T")
ALL = bool(os.environ.get("MOP_FUZZ"))
OPEN = {"memory_by_category", "time_by_kind"}
"""Tables of numbers by names that nobody checks: a mapping of any name to 1 is fine there."""
LONGEST = 2500
KEYS = (
    '"a\\nb"', '"\\u001b[31m"', '"\\u2028"', f'"{"k" * 5000}"', f'"{"9" * 5000}"', "9" * 5000,
    f"0x{'f' * 5000}", "null", ".nan", "[1]", "{}", "1.5", "true", '""', '"colour"',
)  # fmt: skip


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """A value that makes reading run without end is a bug too."""

    def too_long(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"did not end in {seconds} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def refusal(read: Callable[[], Any], what: str) -> str:
    """The line that `read` is refused with, '' where it is content; anything else fails the test."""
    try:
        with at_most(20):
            read()
    except MopError as error:
        line = str(error)
        assert line.isprintable(), f"{what}: {line!r}"
        assert len(line) <= LONGEST, f"{what}: {len(line)} characters"
        return line
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:200]}") from error
    return ""


def names(line: str, fields: set[str]) -> bool:
    return any(re.search(rf"\b{re.escape(field)}\b", line) for field in fields)


def _draw(values: Collection[T], number: int, draw: random.Random) -> list[T]:
    return list(values) if ALL else draw.sample(list(values), number)


def _try(kind: Kind, file: File, path: Path, draw: random.Random, number: int) -> None:
    last = next(step for step in reversed(path) if isinstance(step, str))
    fields = {step for one in kind.fields() for step in one if isinstance(step, str)}
    read = lambda: kind.read(file)  # noqa: E731
    for name, value in _draw(MALFORMED.items(), 2 * number, draw):
        file.write_text(write(put(kind.data, path, value)))
        line = refusal(read, f"{path}: {name}")
        if not (name == "a mapping" and path[-1] in OPEN):
            assert last in line, f"{path}: {name}: {line or 'was accepted'}"
    for name, value in _draw(ODD.items(), number, draw):
        file.write_text(write(put(kind.data, path, value)))
        line = refusal(read, f"{path}: {name}")
        assert not line or names(line, fields), f"{path}: {name}: {line}"
    file.write_text(write(without(kind.data, path)))
    line = refusal(read, f"{path}: left out")
    assert not line or names(line, fields), f"{path}: left out: {line}"
    if isinstance(path[-1], str):
        _try_keys(kind, file, path, draw, number)


def _try_keys(kind: Kind, file: File, path: Path, draw: random.Random, number: int) -> None:
    """The field's key twice, and what is no name in its place."""
    pair = f'"{path[-1]}": @here@'
    text = write(put(kind.data, path, Raw("@here@")))
    file.write_text(text.replace(pair, f'"{path[-1]}": 1, "{path[-1]}": 1'))
    line = refusal(lambda: kind.read(file), f"{path}: twice")
    assert str(path[-1]) in line, f"{path}: twice: {line}"
    assert "given twice" in line
    for key in _draw(KEYS, number, draw):
        file.write_text(text.replace(pair, f"{key}: 1"))
        refusal(lambda: kind.read(file), f"{path}: the key {key[:20]}")


@pytest.mark.parametrize("name", KINDS)
def test_one_field_wrong_is_one_line_that_names_it(name: str, tmp_path: File) -> None:
    kind, draw = KINDS[name], random.Random(name)
    file = tmp_path / kind.name
    file.write_text(write(kind.data))
    assert refusal(lambda: kind.read(file), "unbroken") == ""
    fields = kind.fields()
    fields = fields if ALL else draw.sample(fields, min(len(fields), 40))
    for path in fields:
        _try(kind, file, path, draw, max(1, min(3, 60 // len(fields))))


@pytest.mark.parametrize("name", KINDS)
def test_a_file_cut_short_or_garbled_is_one_line(name: str, tmp_path: File) -> None:
    kind, draw = KINDS[name], random.Random(name)
    file, good = tmp_path / kind.name, json.dumps(KINDS[name].data).encode()
    for _ in range(1000 if ALL else 30):
        start, length = draw.randrange(len(good)), draw.randrange(1, 40)
        garbled = draw.choice(
            (b"", draw.randbytes(length), b"{", b"]", b'"', b"\0", b"\xff\xfe", b": *a &a ")
        )
        file.write_bytes(good[:start] + garbled + good[start + draw.choice((0, length, len(good))) :])
        refusal(lambda: kind.read(file), f"{garbled!r} at {start}")
