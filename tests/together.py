"""One test of many values, where a test of each would cost pytest, its workers and their controller more than
what it checks: some 4 ms a test, and half of one in every process that collects it."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import pytest

T = TypeVar("T")


def together(values: Iterable[T]) -> Callable[[Callable[[T], None]], Callable[[], None]]:
    """In place of `pytest.mark.parametrize` of one parameter: all values are checked, and those that fail are
    named, each with its error."""

    def of(check: Callable[[T], None]) -> Callable[[], None]:
        def every() -> None:
            wrong, known = [], list(values)
            for value in known:
                try:
                    check(value)
                except (Exception, pytest.fail.Exception, pytest.skip.Exception) as error:  # none is skipped
                    wrong.append(f"{value}: {type(error).__name__}: {error}")
            assert known, "no values"
            assert not wrong, "\n" + "\n".join(wrong)

        every.__name__, every.__qualname__ = check.__name__, check.__qualname__
        every.__module__, every.__doc__ = check.__module__, check.__doc__
        return every

    return of
