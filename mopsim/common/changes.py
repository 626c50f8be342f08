"""A spec with some dotted fields changed, and a spec without its defaults."""

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from mopsim.common.errors import MopError, shown
from mopsim.common.io import convert, to_plain

T = TypeVar("T", bound=msgspec.Struct)


def changed(spec: T, changes: Mapping[str, Any], prefix: str) -> T:
    """`spec` with `changes`: dotted field -> plain value, checked as a file is. Raises MopError naming the
    field below `prefix`."""
    if not changes:
        return spec
    plain = to_plain(spec)
    for path, value in changes.items():
        *outer, last = path.split(".")
        place = plain
        for name in outer:
            place = place.get(name) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise MopError(f"{prefix}.{path}: {shown(value)} is given to a field that is none")
        place[last] = value
    return convert(plain, type(spec), prefix)


def sparse(spec: Any) -> Any:
    """The plain objects of a spec without the fields that have their defaults, inside too: short, and the
    same when read again."""
    if not isinstance(spec, msgspec.Struct):
        return [sparse(one) for one in spec] if isinstance(spec, tuple | list) else to_plain(spec)
    found = {}
    for field in msgspec.structs.fields(spec):
        value = getattr(spec, field.name)
        made = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        if made is msgspec.NODEFAULT or value != made:
            found[field.encode_name] = sparse(value)
    return found
