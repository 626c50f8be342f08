"""What a program can do of what a job asks (`Stack.has`): fields of a strategy or a network, their values."""

from typing import Any, Literal, get_args, get_origin

import msgspec

from mopsim.common.errors import SpecError, require
from mopsim.common.explain import not_one_of
from mopsim.common.io import leaves
from mopsim.common.shipped import kept
from mopsim.spec.model import DESCRIPTION, ModelSpec
from mopsim.spec.strategy import Strategy
from mopsim.spec.strategy_rules import BETWEEN, LEAST, WORDS

MODEL = "model."
"""What the key of a network's field begins with."""
NAMES = ("name", "stack", *(MODEL + name for name in DESCRIPTION))
"""Keys of fields that say what a strategy or a network is called and where it is from: no program decides."""
_ASKED = dict(leaves(Strategy)) | dict(leaves(ModelSpec, MODEL))
"""Type of every field of a strategy or a network that holds no struct, by its key."""


def field_of(key: str) -> str:
    """The field of a job that a key of `has` is of, without its condition."""
    return key if key.startswith(MODEL) else f"strategy.{key}"


def plain(value: Any) -> Any:
    """A value of a strategy's field as `has` is asked for it: a tuple where it is a sequence."""
    return tuple(value) if isinstance(value, list) else value


def require_had(key: str, values: tuple[Any, ...]) -> None:
    """An entry of `has` names a field of Strategy or ModelSpec, its values there, and a known condition."""
    path, only, where = key.partition(" where ")
    require(path in _ASKED, "has", key, "is not a field of a strategy, nor model.FIELD of a network")
    require(path not in NAMES, "has", key, "is a description, which no program has or lacks")
    require(bool(values), f"has.{key}", [], "must name the values that the program has")
    if only:
        known = kept("mopsim.spec.capability", "conditions.yaml")
        require(where in known, f"has.{key}", where, "is not a condition of the capability table")
    seen: set[Any] = set()
    for place, value in enumerate(values):
        field = f"has.{key}[{place}]"
        one = _of_type(field, value, _ASKED[path])
        for part in one if isinstance(one, tuple) else (one,):
            _require_possible(path, field, part)
        require(one not in seen, field, value, "is given twice")
        seen.add(one)


def _require_possible(path: str, field: str, value: Any) -> None:
    """A value of its type that no strategy has at `path` is refused as `field`."""
    if path in WORDS:
        require(value in WORDS[path], field, value, not_one_of(WORDS[path]))
    elif path in BETWEEN:
        low, high = BETWEEN[path]
        require(low <= value <= high, field, value, f"must lie between {low} and {high:,}")
    elif isinstance(value, int | float):
        least = LEAST.get(path, 0)
        require(value >= least, field, value, f"must be at least {least}")


def _of_type(field: str, value: Any, kind: Any) -> Any:
    """The value of a strategy's field. Raises SpecError where it is none of its type."""
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError:
        known = get_args(kind) if get_origin(kind) is Literal else ()
        rule = not_one_of(known) if known else "is not of the field's type"
        raise SpecError(field, value, rule) from None
