"""The formats that figures are saved in, chosen once for a whole report."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from mopsim.common.errors import MopError, shown
from mopsim.common.values import listed

FORMATS = ("png", "svg", "pdf")
_also: ContextVar[tuple[str, ...]] = ContextVar("also", default=())


def read_formats(given: str | Sequence[str]) -> tuple[str, ...]:
    """Formats of a comma-separated list or a sequence. Raises MopError."""
    names = tuple(listed(given, "format") if isinstance(given, str) else given)
    for name in names:
        if name not in FORMATS:
            raise MopError(f"format: {shown(name)} is not one of {', '.join(FORMATS)}")
    return names


@contextmanager
def saved_as(formats: Sequence[str]) -> Iterator[None]:
    """Figures of the body are saved in these formats too, beside their own. Raises MopError."""
    before = _also.set(read_formats(formats))
    try:
        yield
    finally:
        _also.reset(before)


def also() -> tuple[str, ...]:
    """What `saved_as` asks for."""
    return _also.get()
