"""A refusal by msgspec as one line: `field: value rule`, the field named down to the key that is wrong."""

import re
import types
from collections.abc import Collection
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from mopsim.common.errors import SpecError, shown
from mopsim.common.nearest import nearest

YAML = {"object": "mapping", "array": "list"}


def explain(error: msgspec.ValidationError, data: Any, kind: Any, prefix: str) -> str:
    """One line for a refusal of `data` as a `kind`; `prefix` names the outermost struct."""
    text = str(error)
    match = re.search(r" - at `(key` in `)?\$(.*)`$", text)
    message = text[: match.start()] if match else text
    steps = _resolve(_steps(match.group(2)) if match else [], data, kind)
    field = prefix + "".join(f"[{step}]" if step.isdigit() else f".{step}" for step in steps)
    cause = error.__cause__
    if isinstance(cause, SpecError):
        return str(cause.within(field))
    if match and match.group(1):
        return f"{field}: {shown(_wrong_key(_value_at(data, steps)))} is refused as a key: {_lower(message)}"
    return _rule(message, field, _value_at(data, steps), _type_at(kind, steps))


def not_one_of(choices: Collection[Any]) -> str:
    """'is not one of a, b', an empty choice last and in words."""
    names = [str(choice) for choice in choices if choice != ""]
    return f"is not one of {', '.join(names)}{', nor empty' if '' in choices else ''}"


def _rule(message: str, field: str, value: Any, wanted: Any) -> str:
    unknown = re.match(r"Object contains unknown field `(.*)`", message, re.DOTALL)
    if unknown:
        name = unknown.group(1)
        fields = getattr(_struct(wanted), "__struct_fields__", ())
        near = nearest(name, fields, 1)
        hint = f"an unknown field{f', near {near[0]}' if near else ''}; known fields: {', '.join(fields)}"
        inner = value.get(name) if isinstance(value, dict) else value
        return f"{field}.{name[:60]}: {shown(inner)} is {hint}"
    missing = re.match(r"Object missing required field `(.*)`", message)
    if missing:
        return f"{field}.{missing.group(1)}: missing, the field is required"
    allowed = [
        choice for option in _options(wanted) if get_origin(option) is Literal for choice in get_args(option)
    ]
    if allowed:
        words = ["true", "false"] if bool in _options(wanted) else []
        return f"{field}: {shown(value)} {not_one_of([*words, *allowed])}"
    if float in _options(wanted) and isinstance(value, str):  # nan and inf are words of YAML
        return f"{field}: {shown(value)} must be a finite number"
    return f"{field}: {shown(value)} is refused: {_lower(message)}"


def _lower(message: str) -> str:
    """A sentence of msgspec's as a clause, with what YAML calls JSON's objects and arrays."""
    said = re.sub(r"(?<=[`| ])(object|array)(?=[`| ])", lambda word: YAML[word[0]], message)
    return said[:1].lower() + said[1:]


def _steps(path: str) -> list[str]:
    """'.a.b[0][...].c' -> a, b, 0, ..., c; msgspec writes '...' for any key of a dict."""
    return [index or name for index, name in re.findall(r"\[([^\]]*)\]|\.([^.\[\]]+)", path)]


def _resolve(steps: list[str], data: Any, kind: Any) -> list[str]:
    """`steps` with each '...' replaced by the key whose value is refused."""
    found: list[str] = []
    for index, step in enumerate(steps):
        if step == "...":
            here, wanted = _value_at(data, found), _type_at(kind, [*found, "..."])
            step = next((str(key) for key, value in here.items() if not _accepts(value, wanted)), step)
            found.append(step)
            found += _resolve(steps[index + 1 :], here.get(step), wanted)
            return found
        found.append(step)
    return found


def _accepts(value: Any, wanted: Any) -> bool:
    try:
        msgspec.convert(value, wanted, strict=True)
    except msgspec.ValidationError:
        return False
    return True


def _wrong_key(mapping: Any) -> Any:
    keys = mapping if isinstance(mapping, dict) else ()
    return next((key for key in keys if not isinstance(key, str)), mapping)


def _value_at(data: Any, steps: list[str]) -> Any:
    for step in steps:
        if isinstance(data, dict):
            data = data.get(step)
        elif isinstance(data, list | tuple) and step.isdigit() and int(step) < len(data):
            data = data[int(step)]
        else:
            return data
    return data


def _options(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _struct(kind: Any) -> Any:
    return next((option for option in _options(kind) if hasattr(option, "__struct_fields__")), None)


def _type_at(kind: Any, steps: list[str]) -> Any:
    """The declared type at a path through structs, dicts and sequences."""
    for step in steps:
        struct = _struct(kind)
        if struct is not None:
            kind = get_type_hints(struct).get(step)
            continue
        container = next((option for option in _options(kind) if get_args(option)), None)
        arguments = [argument for argument in get_args(container) if argument is not Ellipsis]
        kind = arguments[-1] if arguments else None
    return kind
