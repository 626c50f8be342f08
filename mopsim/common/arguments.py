"""What a caller in Python gives a function, held to its annotations: one line that names what they do not
take."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from mopsim.common.errors import MopError, shown
from mopsim.common.nearest import nearest

P = ParamSpec("P")
T = TypeVar("T")
_hints = cache(get_type_hints)


def named(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, which refuses an argument of another type than it is annotated with. Raises MopError; a
    TypeError for an argument that it does not have."""

    @wraps(function)
    def call(*args: P.args, **given: P.kwargs) -> T:
        check_arguments(function, *args, **given)
        return function(*args, **given)

    return call


def check_arguments(function: Callable[..., Any], *args: Any, **given: Any) -> None:
    """Raise as `named` does, without a call."""
    signature, hints = inspect.signature(function), _hints(function)
    try:
        bound = signature.bind(*args, **given).arguments
    except TypeError as error:
        raise TypeError(f"{function.__name__}() {error}{_near(signature, given)}") from None
    for name, value in bound.items():
        if name in hints and not _fits(value, hints[name]):
            raise MopError(f"{name}: {shown(value)} is refused: expected {_said(hints[name])}")


def _near(signature: inspect.Signature, given: Mapping[str, Any]) -> str:
    """What a keyword that is unknown was meant to be: those near it, else all."""
    known = list(signature.parameters)
    unknown = next((one for one in given if one not in known), None)
    return "" if unknown is None else f"; it has {', '.join(nearest(unknown, known) or known)}"


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin in (Sequence, tuple):
        return _is_sequence(value) and _are(list(value), inner, fixed=not _of_any_length(hint))
    if origin is Mapping:
        keys, values = inner
        return isinstance(value, Mapping) and all(
            _fits(key, keys) and (values is Any or _fits(value[key], values)) for key in value
        )
    if origin is not None:
        return isinstance(value, origin)
    if hint in _NUMBERS:
        return isinstance(value, _NUMBERS[hint]) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)


_NUMBERS = {int: Integral, float: Real}


def _is_sequence(value: Any) -> bool:
    """A list, a tuple, an array; not a text, which is one value."""
    lasting = hasattr(value, "__len__") and hasattr(value, "__getitem__")
    return lasting and not isinstance(value, str | bytes | Mapping)


def _are(values: list[Any], kinds: tuple[Any, ...], fixed: bool) -> bool:
    """Whether they are of these kinds, one each where their number is fixed, else all of the first."""
    if fixed and len(values) != len(kinds):
        return False
    return all(map(_fits, values, kinds if fixed else kinds[:1] * len(values)))


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
