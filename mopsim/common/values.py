"""Plain objects (of a file, or a caller's dict) that no field can hold, found before anything reads them."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from mopsim.common.errors import MopError, shown

MOST_VALUES = 1_000_000
DEEPEST = 32
_BITS = 64
_TEXT, _NUMBERS = {str}, {int, float}
_SCALARS = {str, bool, int, float, type(None)}


def listed(given: str, field: str) -> list[str]:
    """The values of a comma-separated list. Raises MopError for an empty one and one that is there twice."""
    values = [value.strip() for value in given.split(",")]
    for place, value in enumerate(values):
        if not value:
            raise MopError(f"{field}: {shown(given)} has an empty value")
        if value in values[:place]:
            raise MopError(f"{field}: {shown(given)} has {value} twice")
    return values


def require_fields(given: Any, field: str) -> dict[str, Any]:
    """A mapping of fields. Raises MopError for anything else: an empty file is nothing."""
    if isinstance(given, dict):
        return given
    names = {
        "NoneType": "nothing",
        "str": "text",
        "list": "a list",
        "tuple": "a list",
        "bool": "true or false",
    }
    kind = type(given).__name__
    number = "a number" if isinstance(given, int | float) else kind
    raise MopError(f"{field}: must be a mapping of fields, is {names.get(kind, number)}")


def parse_float(text: str) -> float:
    """The number that a text says. Raises ValueError for what only a programmer reads as one: 1_0."""
    if "_" in text or not text.isascii():
        raise ValueError(text)
    return float(text)


def require_once(values: Sequence[Any], field: str) -> None:
    """Raise MopError for a value of `field` that is there twice."""
    for place, value in enumerate(values):
        if value in values[:place]:
            raise MopError(f"{field}: {shown(value)} is given twice")


MOST_DIGITS = 1000
"""Of an integer of a file."""


class Endless(str):
    """The text of an integer with more digits; no field takes it."""

    def __repr__(self) -> str:
        return f"an integer of {len(self):,} digits"


def first_unreadable(data: Any, field: str = "") -> tuple[str, str] | None:
    """(field, problem) of the first value that can't be walked, printed or repeated safely: nesting deeper
    than DEEPEST, more than MOST_VALUES values (an alias counts as what it repeats), an integer without end,
    something that is neither a mapping, a list, text, a number, true, false nor null."""
    if _plain(data):
        return None
    for count, (path, value, depth) in enumerate(_walk(data, field)):
        if count > MOST_VALUES:
            return path, f"holds more than {MOST_VALUES:,} values, counting aliases as what they repeat"
        if depth > DEEPEST:
            return trimmed(path), f"is nested deeper than {DEEPEST} levels"
        if isinstance(value, Endless):
            return path, f"{value!r} is more than any field takes"
        if not isinstance(value, dict | list | tuple | str | bool | int | float | None):
            return path, f"{shown(value)} is a {type(value).__name__}, which no field takes"
        if isinstance(value, dict):
            for key in value:
                if not (isinstance(key, str) and key):  # null too
                    return path, f"{shown(key)} is refused as a key: text is needed"
    return None


def first_unfit(data: Any, field: str = "") -> tuple[str, str] | None:
    """As `first_unreadable`; also NaN, infinity and integers beyond 64 bits."""
    if _plain(data, fit=True):
        return None
    found = first_unreadable(data, field)
    if found is not None:
        return found
    for path, value, _ in _walk(data, field):
        problem = number_problem(value)
        if problem:
            return path, problem
    return None


def _plain(data: Any, *, fit: bool = False) -> bool:
    """Whether nothing in plain objects is wrong: told level by level, without the path of each value, which
    takes several times as long. fit: of numbers too."""
    level, count = [data], 0
    for _ in range(DEEPEST + 1):
        inner: list[Any] = []
        count += len(level)
        for value in level:
            kind = type(value)
            if kind is dict:
                inner += value.values()
                if not _TEXT.issuperset(map(type, value)) or "" in value:
                    return False
            elif kind is list or kind is tuple:
                inner += value
            elif kind not in _SCALARS or (fit and kind in _NUMBERS and number_problem(value)):
                return False
            if count + len(inner) > MOST_VALUES:
                return False
        if not inner:
            return True
        level = inner
    return False


def number_problem(value: Any) -> str:
    """'' where a number is finite and of 64 bits (or `value` is no number), else its value and the rule."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f"{value!r} must be a finite number"
    if isinstance(value, int) and value.bit_length() > _BITS:
        return f"{shown(value)} is an integer beyond 64 bits"
    return ""


def _walk(data: Any, field: str) -> Iterator[tuple[str, Any, int]]:
    """(field, value, depth) of everything inside plain objects, in order; no recursion."""
    waiting: list[tuple[str, Any, int]] = [(field, data, 0)]
    while waiting:
        path, value, depth = waiting.pop()
        yield path, value, depth
        if isinstance(value, dict):
            inner = [(_inside(path, key), one, depth + 1) for key, one in value.items()]
            waiting.extend(reversed(inner))
        elif isinstance(value, list | tuple):
            waiting.extend(
                reversed([(f"{path}[{index}]", one, depth + 1) for index, one in enumerate(value)])
            )


def _inside(path: str, key: Any) -> str:
    name = key if isinstance(key, str) and len(key) <= 60 else shown(key)[:60]
    return f"{path}.{name}" if path else name


def trimmed(path: str) -> str:
    """`path` without a run of one step at its end: what endless nesting adds says nothing."""
    return re.sub(r"(\[\d+\]|\.[^.\[\]]+)\1+$", "", path)
