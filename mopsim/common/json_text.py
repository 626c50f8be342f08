"""JSON as text, as strictly as YAML: a key given twice, digits or nesting without end are named."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from mopsim.common.errors import MopError, shown
from mopsim.common.io import read_text
from mopsim.common.values import MOST_DIGITS, Endless, first_unfit
from mopsim.common.yaml_text import field_at

_KEY = re.compile(r'"((?:[^"\\]|\\.)*)"\s*:')


def parse_json(text: str, origin: str) -> Any:
    """The plain objects of a JSON text. Raises MopError naming `origin` and the field."""
    try:
        data = json.loads(text, object_pairs_hook=unique_keys, parse_int=_integer)
    except RecursionError:
        raise MopError(f"{origin}: {field_at(text, None)}is nested too deeply") from None
    except ValueError as error:
        keys = _KEY.findall(text[: error.pos]) if isinstance(error, json.JSONDecodeError) else []
        field = f"{keys[-1][:100]}: " if keys else ""
        raise MopError(f"{origin}: {field}is not valid JSON: {error}") from None
    problem = first_unfit(data)
    if problem is not None:
        raise MopError(": ".join(part for part in (origin, *problem) if part))
    return data


def read_object(path: Path, field: str) -> dict[str, Any]:
    """The object in a JSON file that another program wrote and the user named as `field`. Raises MopError."""
    found, text = None, read_text(path, field)
    with suppress(msgspec.DecodeError, RecursionError):
        found = msgspec.json.decode(text)
    if not isinstance(found, dict):
        raise MopError(": ".join((field, str(path), *_why_no_object(text))))
    return found


def _why_no_object(text: str) -> tuple[str, ...]:
    """(field, problem) of a number that JSON does not have (NaN, which Python writes), or the rule."""
    with suppress(ValueError, RecursionError):
        data = json.loads(text, parse_int=_integer)
        if isinstance(data, dict) and (problem := first_unfit(data)):
            return problem
    return ("is not a JSON object",)


class KeyTwiceError(ValueError):
    """Of an object of JSON."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, as json's `object_pairs_hook`. Raises KeyTwiceError."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise KeyTwiceError(f"the key {shown(key)} is given twice")
        found[key] = value
    return found


def _integer(text: str) -> int | Endless:
    return int(text) if len(text) <= MOST_DIGITS else Endless(text)
