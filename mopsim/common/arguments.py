"""What a caller in Python gave a function, where it cannot be: one line that names it."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from mopsim.common.errors import MopError, shown

P = ParamSpec("P")
T = TypeVar("T")
OF_TYPES = (AssertionError, AttributeError, ArithmeticError, LookupError, TypeError)
"""What Python raises where code meets a value of a type that it was not written for."""


def named(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, whose failure over an argument of another type than it is annotated with is a MopError."""

    @wraps(function)
    def call(*args: P.args, **given: P.kwargs) -> T:
        try:
            return function(*args, **given)
        except OF_TYPES:
            hints, bound = get_type_hints(function), inspect.signature(function).bind(*args, **given)
            for name, value in bound.arguments.items():
                if not _fits(value, hints[name]):
                    raise MopError(
                        f"{name}: {shown(value)} is refused: expected {_said(hints[name])}"
                    ) from None
            raise

    return call


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is Sequence:
        return isinstance(value, Sequence) and all(_fits(one, inner[0]) for one in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(one, inner[1]) for one in value.values())
    if origin is not None:
        return isinstance(value, origin)
    kinds = {int: Integral, float: Real, Any: object}
    return isinstance(value, kinds.get(hint, hint))


def _said(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_said, inner))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is Sequence:
        return f"a sequence of {_said(inner[0])}"
    if origin is Mapping:
        return f"a mapping to {_said(inner[1])}"
    return "None" if hint is NoneType else str(getattr(hint, "__name__", hint))
