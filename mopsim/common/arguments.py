"""What a caller in Python gives a function, held to its annotations: one line that names what they do not
take."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from mopsim.common.errors import MopError, shown
from mopsim.common.nearest import nearest

P = ParamSpec("P")
T = TypeVar("T")
_hints = cache(get_type_hints)


def named(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, which refuses an argument of another type than it is annotated with, and is given numbers
    and sequences of other libraries as Python's own. Raises MopError; a TypeError for an argument that it
    does not have."""

    @wraps(function)
    def call(*args: P.args, **given: P.kwargs) -> T:
        bound = checked_arguments(function, *args, **given)
        return function(*bound.args, **bound.kwargs)

    return call


def checked_arguments(function: Callable[..., Any], *args: Any, **given: Any) -> inspect.BoundArguments:
    """What `function` is given by `named`. Raises as that does."""
    signature, hints = inspect.signature(function), _hints(function)
    try:
        bound = signature.bind(*args, **given)
    except TypeError as error:
        raise TypeError(f"{function.__name__}() {error}{_near(signature, given)}") from None
    for name, value in bound.arguments.items():
        if name not in hints:
            continue
        if isinstance(value, str) and not value.strip() and Path in get_args(hints[name]):
            raise MopError(f"{name}: {shown(value)} must not be empty")
        taken = _taken(value, hints[name])
        if taken is _UNFIT:
            raise MopError(f"{name}: {shown(value)} is refused: expected {_said(hints[name])}")
        bound.arguments[name] = taken
    return bound


def _near(signature: inspect.Signature, given: Mapping[str, Any]) -> str:
    """What a keyword that is unknown was meant to be: those near it, else all."""
    known = list(signature.parameters)
    unknown = next((one for one in given if one not in known), None)
    return "" if unknown is None else f"; it has {', '.join(nearest(unknown, known) or known)}"


def _taken(value: Any, hint: Any) -> Any:
    """`value` as a `hint`: itself, or the same in Python's own types; _UNFIT where it is none."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return next((found for one in inner if (found := _taken(value, one)) is not _UNFIT), _UNFIT)
    if origin is Literal:
        return next((one for one in inner if _is(value, one)), _UNFIT)
    if origin in (Sequence, tuple):
        found = _taken_sequence(value, inner, fixed=not _of_any_length(hint))
        return found if found is _UNFIT or origin is Sequence else tuple(found)
    if origin is Mapping:
        return _taken_mapping(value, *inner)
    if origin is not None:
        return value if isinstance(value, origin) else _UNFIT
    if hint in (int, float):
        return _taken_number(value, hint)
    return value if hint is Any or isinstance(value, hint) else _UNFIT


_UNFIT = object()


def _is(value: Any, one: Any) -> bool:
    """Whether it is this value of a Literal: of its type first, since an array may equal anything."""
    kind = type(one)
    plain = _taken_number(value, int) if kind is int else value
    return isinstance(plain, kind) and plain == one


def _taken_number(value: Any, kind: Any) -> Any:
    """As an int, or a float."""
    stands_for: Any = Integral if kind is int else Real
    if isinstance(value, bool) or not isinstance(value, stands_for):
        return _UNFIT
    try:
        return value if type(value) in (int, float) else kind(value)
    except OverflowError:  # a fraction beyond all floats
        return _UNFIT


def _taken_sequence(value: Any, kinds: tuple[Any, ...], fixed: bool) -> Any:
    """A list, a tuple, an array; not a text, which is one value. Of these kinds, one each where their number
    is fixed, else all of the first."""
    lasting = hasattr(value, "__len__") and hasattr(value, "__getitem__")
    if not lasting or isinstance(value, str | bytes | Mapping):
        return _UNFIT
    try:
        values = list(value)
    except TypeError:  # an array of no dimension
        return _UNFIT
    if fixed and len(values) != len(kinds):
        return _UNFIT
    found = [*map(_taken, values, kinds if fixed else kinds[:1] * len(values))]
    if any(one is _UNFIT for one in found):
        return _UNFIT
    return tuple(found) if isinstance(value, tuple) else found


def _taken_mapping(value: Any, keys: Any, values: Any) -> Any:
    if not isinstance(value, Mapping):
        return _UNFIT
    if values is Any:
        return value if all(_taken(key, keys) is not _UNFIT for key in value) else _UNFIT
    found = {_taken(key, keys): _taken(value[key], values) for key in value}
    return _UNFIT if any(one is _UNFIT for pair in found.items() for one in pair) else found


def _of_any_length(hint: Any) -> bool:
    """Whether it is a Sequence[X] or a tuple[X, ...]."""
    return get_origin(hint) is Sequence or (get_origin(hint) is tuple and get_args(hint)[-1] is ...)


def _said(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_said, inner))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is Mapping:
        return f"a mapping of {_said(inner[0])} to {_said(inner[1])}"
    if _of_any_length(hint):
        return f"a sequence of {_said(inner[0])}"
    if origin is tuple:
        return f"({', '.join(map(_said, inner))})"
    if origin is Callable:
        return "a function"
    return "None" if hint is NoneType else str(getattr(hint, "__name__", hint))
