"""YAML and JSON in and out: strict reading that names field, value and rule; writing aside, then renaming."""

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import msgspec
import yaml

from mopsim.spec.errors import MopError, SpecError

T = TypeVar("T", bound=msgspec.Struct)

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every noun: frozen, keyword-only, unknown fields refused, validated when made."""


def read_text(path: Path) -> str:
    """The UTF-8 text of a file the user named. Raises MopError in one line when it can't be had."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MopError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise MopError(f"{path}: is a directory, a file is needed") from None
    except UnicodeDecodeError:
        raise MopError(f"{path}: is not UTF-8 text") from None
    except OSError as error:
        raise MopError(f"{path}: {error.strerror or error}") from None


def parse_yaml(text: str, origin: str) -> Any:
    """The plain objects of a YAML (or JSON) text. Raises MopError naming `origin` and the line."""
    try:
        return yaml.load(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise MopError(f"{origin}:{where} is not valid YAML: {getattr(error, 'problem', error)}") from None


def convert(data: Any, kind: type[T], prefix: str, origin: str = "") -> T:
    """`data` (plain objects) as a validated `kind`; fields are named from `prefix` in errors."""
    head = f"{origin}: " if origin else ""
    if not isinstance(data, dict):
        raise MopError(f"{head}{prefix}: must be a mapping of fields, got {type(data).__name__}")
    try:
        return msgspec.convert(data, kind, strict=True)
    except msgspec.ValidationError as error:
        raise MopError(head + _explain(error, data, kind, prefix)) from None


def load(path: Path, kind: type[T], prefix: str) -> T:
    """Read one YAML file into a validated `kind`."""
    return convert(parse_yaml(read_text(path), str(path)), kind, prefix, str(path))


def to_plain(spec: Any) -> Any:
    """Plain dicts, lists and scalars, ready for YAML or JSON."""
    return msgspec.to_builtins(spec)


def to_yaml(spec: Any) -> str:
    """The YAML text of a spec, fields in their declared order."""
    return str(yaml.dump(to_plain(spec), Dumper=_DUMPER, sort_keys=False, allow_unicode=True))


def digest(spec: Any) -> str:
    """First 12 hex digits of the SHA-256 of the canonical JSON of a spec."""
    text = json.dumps(to_plain(spec), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def write_text(path: Path, text: str) -> None:
    """Write aside in the same directory, then rename: readers never see half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise MopError(f"{path}: is a directory, a file is to be written there")
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except (FileExistsError, NotADirectoryError):
        raise MopError(f"{path}: its parent is a file, not a directory") from None
    except OSError as error:
        raise MopError(f"{path}: cannot be written: {error.strerror or error}") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except OSError as error:
        Path(aside).unlink(missing_ok=True)
        raise MopError(f"{path}: cannot be written: {error.strerror or error}") from None


def write_yaml(path: Path, spec: Any) -> None:
    """Write a spec as YAML, atomically."""
    write_text(path, to_yaml(spec))


def write_json(path: str, value: Any) -> None:
    """Write JSON to a file atomically, or to standard output when `path` is '-'."""
    text = json.dumps(to_plain(value), indent=2) + "\n"
    if path == "-":
        print(text, end="", flush=True)
    else:
        write_text(Path(path), text)


def _explain(error: msgspec.ValidationError, data: Any, kind: type, prefix: str) -> str:
    """One line `field: value rule` for a msgspec refusal."""
    text = str(error)
    match = re.search(r" - at `(key in )?\$(.*)`$", text)
    inner = match.group(2) if match else ""
    message = text[: match.start()] if match else text
    field = prefix + inner
    cause = error.__cause__
    if isinstance(cause, SpecError):
        return str(cause.within(field))
    unknown = re.match(r"Object contains unknown field `(.*)`", message)
    if unknown:
        known = ", ".join(_fields_at(kind, inner))
        return f"{field}.{unknown.group(1)}: {_value_at(data, inner + '.' + unknown.group(1))!r} is an unknown field; known fields: {known}"
    missing = re.match(r"Object missing required field `(.*)`", message)
    if missing:
        return f"{field}.{missing.group(1)}: missing, the field is required"
    return f"{field}: {_value_at(data, inner)!r} is refused: {message[0].lower() + message[1:]}"


def _steps(path: str) -> list[str]:
    return re.findall(r"[^.\[\]]+", path)


def _value_at(data: Any, path: str) -> Any:
    for step in _steps(path):
        if isinstance(data, dict):
            data = data.get(step)
        elif isinstance(data, list) and step.isdigit() and int(step) < len(data):
            data = data[int(step)]
        else:
            return data
    return data


def _fields_at(kind: Any, path: str) -> list[str]:
    for step in _steps(path):
        hints = get_type_hints(kind) if hasattr(kind, "__struct_fields__") else {}
        candidate = hints.get(step)
        for option in getattr(candidate, "__args__", (candidate,)):
            if hasattr(option, "__struct_fields__"):
                candidate = option
        kind = candidate if hasattr(candidate, "__struct_fields__") else kind
    return list(getattr(kind, "__struct_fields__", ()))
