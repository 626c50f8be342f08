"""YAML and JSON in and out: strict reading that names field, value and rule; writing aside, then renaming."""

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from mopsim.common.errors import MopError
from mopsim.common.explain import explain, first_not_finite

T = TypeVar("T", bound=msgspec.Struct)

_MOST_VALUES = 1_000_000
_FLOAT_TAG = "tag:yaml.org,2002:float"
_FLOAT = re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML that reads 3e-4 as a number (YAML 1.1 wants 3.0e-4) and refuses a key that is given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool) and key in seen:
                problem = f"the key {key!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key if isinstance(key, str | int | float | bool) else id(key_node))
        return super().construct_mapping(node, deep)


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Quotes the strings that _Loader would read as numbers."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+.0123456789"))


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every noun: frozen, keyword-only, unknown fields refused, validated when made."""


def read_text(path: Path, field: str = "") -> str:
    """The UTF-8 text of a file the user named as `field`. Raises MopError where it can't be had."""
    where = f"{field}: {path}" if field else str(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise MopError(f"{where}: no such file") from None
    except IsADirectoryError:
        raise MopError(f"{where}: is a directory, a file is needed") from None
    except UnicodeDecodeError:
        raise MopError(f"{where}: is not UTF-8 text") from None
    except OSError as error:
        raise MopError(f"{where}: {error.strerror or error}") from None


def exists(path: Path) -> bool:
    """Whether something is there, also where the system will not say: a name too long, no permission."""
    try:
        return path.exists()
    except OSError:
        return False


def parse_yaml(text: str, origin: str) -> Any:
    """The plain objects of a YAML (or JSON) text. Raises MopError naming `origin` and the line."""
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}:" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise MopError(f"{origin}:{where} is not valid YAML: {problem}") from None
    except (ValueError, RecursionError) as error:  # a date such as 2026-13-45, or nesting without end
        raise MopError(f"{origin}: is not valid YAML: {error}") from None
    if _holds_more_than(data, _MOST_VALUES):
        raise MopError(
            f"{origin}: holds more than {_MOST_VALUES:,} values, counting aliases as what they repeat"
        )
    return data


def read_yaml(path: Path, field: str) -> Any:
    """The plain objects of a YAML file that the user named as `field`. Raises MopError."""
    return parse_yaml(read_text(path, field), f"{field}: {path}")


def _holds_more_than(data: Any, most: int) -> bool:
    """Whether plain objects hold more than `most` values; an alias may repeat itself without end."""
    left, waiting = most, [data]
    while waiting and left >= 0:
        value = waiting.pop()
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        left -= 1 + len(inner)
        waiting.extend(each for each in inner if isinstance(each, dict | list))
    return left < 0


def convert(data: Any, kind: type[T], prefix: str, origin: str = "") -> T:
    """`data` (plain objects) as a validated `kind`; fields are named from `prefix` in errors."""
    head = f"{origin}: " if origin else ""
    if not isinstance(data, dict):
        raise MopError(f"{head}{prefix}: must be a mapping of fields, got {type(data).__name__}")
    endless = first_not_finite(data, prefix)
    if endless:
        raise MopError(f"{head}{endless[0]}: {endless[1]!r} must be a finite number")
    try:
        return msgspec.convert(data, kind, strict=True)
    except msgspec.ValidationError as error:
        raise MopError(head + explain(error, data, kind, prefix)) from None


def load(path: Path, kind: type[T], prefix: str) -> T:
    """Read one YAML file into a validated `kind`."""
    return convert(read_yaml(path, prefix), kind, prefix, str(path))


def to_plain(spec: Any) -> Any:
    """Plain dicts, lists and scalars, ready for YAML or JSON."""
    return msgspec.to_builtins(spec)


def to_yaml(spec: Any) -> str:
    """The YAML text of a spec, fields in their declared order."""
    return str(yaml.dump(to_plain(spec), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def digest(spec: Any) -> str:
    """First 12 hex digits of the SHA-256 of the canonical JSON of a spec."""
    text = json.dumps(to_plain(spec), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def write_text(path: Path, text: str) -> None:
    """Write aside in the same directory, then rename: readers never see half a file. Links are followed."""
    path = Path(os.path.realpath(path))
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
    except BaseException as error:  # an interruption too
        Path(aside).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise MopError(f"{path}: cannot be written: {error.strerror or error}") from None
        raise


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
