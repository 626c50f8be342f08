"""YAML and JSON in and out: strict reading that names field, value and rule; writing aside, then renaming."""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import msgspec

from mopsim.common.aside import aside
from mopsim.common.errors import MopError, Rule, Rules, SpecError
from mopsim.common.explain import explain
from mopsim.common.outputs import check_place, real_path
from mopsim.common.results import made_by
from mopsim.common.values import first_unfit, require_fields
from mopsim.common.yaml_text import dump_yaml
from mopsim.common.yaml_text import parse_yaml as parse_yaml

LARGEST = 2**28
"""Characters of a file that is read whole: a device such as /dev/zero has no end."""

_PIPED: dict[tuple[int, int] | None, str] = {}
"""Of a pipe without a name -> its text: it can be read once, and a command reads what it is given again."""

T = TypeVar("T", bound=msgspec.Struct)
SUFFIXES = (".yaml", ".yml", ".json")
"""Of what is a file's name, whether or not there is one."""
OF_TYPES = (AssertionError, AttributeError, ArithmeticError, LookupError, TypeError)
"""What Python raises where code meets a value of a type that it was not written for."""


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every noun: frozen, keyword-only, unknown fields refused, held to its rules when made. Python
    holds no field to its type: where a rule meets a value of another, that field is named."""

    def __init_subclass__(cls) -> None:
        check = cls.__dict__.get("__post_init__")
        if check is None and "_rules" not in cls.__dict__:
            return

        def made(self: "Spec") -> None:
            try:
                if check is not None:
                    check(self)
                self.hold(self._rules())
            except OF_TYPES:
                checked(self, cls, cls.__name__)
                raise

        cls.__post_init__ = made  # type: ignore[attr-defined]

    def _rules(self) -> Rules:
        """What must hold, in the order in which it is told."""
        return iter(())

    def hold(self, rules: Iterable[Rule], prefix: str = "") -> None:
        """Raise SpecError for the first rule that does not hold. Values are looked up for the message only: a
        search makes thousands of strategies."""
        for holds, field, rule in rules:
            if not holds:
                value = attrgetter(field)(self)
                raise SpecError(prefix + field, list(value) if isinstance(value, tuple) else value, rule)


def leaves(spec: type[msgspec.Struct], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, type) of the fields that hold no struct."""
    for name, kind in get_type_hints(spec).items():
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            yield from leaves(kind, f"{prefix}{name}.")
        elif not name.startswith("__"):
            yield f"{prefix}{name}", kind


def read_text(path: Path, field: str = "") -> str:
    """The UTF-8 text of a file the user named as `field`. Raises MopError where it can't be had."""
    where = f"{field}: {path}" if field else str(path)
    try:
        if path.is_fifo() and path.resolve().is_fifo():  # else a pipe without a name: /dev/stdin, <(...)
            raise MopError(f"{where}: is not a regular file: who reads a named pipe may wait without end")
        with path.open(encoding="utf-8-sig") as file:
            state = os.fstat(file.fileno())
            pipe = (state.st_dev, state.st_ino) if stat.S_ISFIFO(state.st_mode) else None
            text = _PIPED[pipe] if pipe in _PIPED else file.read(LARGEST + 1)
            if pipe:
                _PIPED[pipe] = text
    except (FileNotFoundError, NotADirectoryError):
        raise MopError(f"{where}: no such file") from None
    except IsADirectoryError:
        raise MopError(f"{where}: is a directory, a file is needed") from None
    except UnicodeDecodeError:
        raise MopError(f"{where}: is not UTF-8 text") from None
    except ValueError as error:  # a zero byte in its name
        raise MopError(f"{where}: cannot be a path: {error}") from None
    except OSError as error:
        raise MopError(f"{where}: {error.strerror or error}") from None
    if len(text) > LARGEST:
        raise MopError(f"{where}: is longer than {LARGEST:,} characters, which no file of this kind is")
    return text


def exists(path: Path) -> bool:
    """Whether something is there, also where the system will not say: a name too long, no permission."""
    return os.path.exists(path)


def read_yaml(path: Path, field: str) -> Any:
    """The plain objects of a YAML file that the user named as `field`. Raises MopError, also for the JSON of
    a command: no noun is in one."""
    data = parse_yaml(read_text(path, field), f"{field}: {path}")
    if command := made_by(data):
        instead = "; give the file of its --plan" if field in ("plan", "strategy") else ""
        raise MopError(f"{field}: {path}: is a result, the --json of mopsim {command}{instead}")
    return data


def convert(data: Any, kind: type[T], prefix: str, origin: str = "") -> T:
    """`data` (plain objects) as a validated `kind`; fields are named from `prefix` in errors."""
    head = f"{origin}: " if origin else ""
    require_fields(data, f"{head}{prefix}")
    problem = first_unfit(data, prefix)
    if problem:
        raise MopError(f"{head}{problem[0]}: {problem[1]}")
    try:
        return msgspec.convert(data, kind, strict=True)
    except msgspec.ValidationError as error:
        raise MopError(head + explain(error, data, kind, prefix)) from None


def checked(spec: T, kind: type[T], prefix: str) -> T:
    """A spec that was made in Python, every field held to its type. Raises MopError as `convert` does."""
    return convert(_fields(spec), kind, prefix)


def _fields(value: Any) -> Any:
    """Plain objects, but for what no field takes."""
    if isinstance(value, msgspec.Struct):
        found = {name: _fields(getattr(value, name)) for name in value.__struct_fields__}
        return {name: one for name, one in found.items() if one is not msgspec.UNSET}
    if isinstance(value, dict):
        return {name: _fields(one) for name, one in value.items()}
    return [_fields(one) for one in value] if isinstance(value, list | tuple) else value


def load(path: Path, kind: type[T], prefix: str) -> T:
    """Read one YAML file into a validated `kind`."""
    return convert(read_yaml(path, prefix), kind, prefix, str(path))


def to_plain(spec: Any) -> Any:
    """Plain dicts, lists and scalars, ready for YAML or JSON."""
    return msgspec.to_builtins(spec)


def to_yaml(spec: Any) -> str:
    """The YAML text of a spec, fields in their declared order."""
    return dump_yaml(to_plain(spec))


def as_json(value: Any, *, indent: int | None = None, ascii: bool = True) -> str:
    """JSON of a spec or plain objects, compact without `indent`; only specs are made plain first, a trace is
    millions of objects. Raises MopError naming the first number that JSON has no word for, NaN or infinite:
    who reads the file would break on it."""
    separators = (",", ":") if indent is None else None
    try:
        return json.dumps(
            value, indent=indent, separators=separators, ensure_ascii=ascii, allow_nan=False, default=to_plain
        )
    except ValueError as error:
        field, problem = first_unfit(to_plain(value)) or ("", str(error))
        raise MopError(f"JSON: {field}: {problem}: nothing is written") from None


def sha256(spec: Any) -> str:
    """SHA-256 of the canonical JSON of a spec, or of plain objects; hex digits."""
    text = json.dumps(to_plain(spec), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def digest(spec: Any) -> str:
    """The first 12 hex digits of that."""
    return sha256(spec)[:12]


def identified(spec: Any) -> str:
    """'h200-sxm-141g (digest 0123456789ab)': a named spec's name and digest."""
    return f"{spec.name} (digest {digest(spec)})"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write aside in the same directory, then rename: readers never see half a file. Links are followed."""
    with _aside(path, content):
        pass


@contextmanager
def _aside(path: Path, content: bytes) -> Iterator[None]:
    """A file aside with this content, which becomes `path` once the body has ended well. Raises MopError."""
    path = real_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_place(path)
    except (FileExistsError, NotADirectoryError):
        raise MopError(f"{path}: its parent is a file, not a directory") from None
    except OSError as error:
        raise MopError(f"{path}: cannot be written: {error.strerror or error}") from None
    try:
        with aside(path) as beside:
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            yield
            beside.chmod(0o644)
            beside.replace(path)
    except OSError as error:
        raise MopError(f"{path}: cannot be written: {error.strerror or error}") from None


def write_yaml(path: Path, spec: Any) -> None:
    """Write a spec as YAML, atomically."""
    write_text(path, to_yaml(spec))


def write_json(path: str, value: Any) -> None:
    """Write JSON to a file atomically, or to standard output when `path` is '-'."""
    with json_beside(path, value):
        pass


@contextmanager
def json_last(path: str | None, made: Callable[[], Any]) -> Iterator[None]:
    """Write the JSON of `made` once the body has written what is smaller: that stays where the JSON does not
    fit. Standard output has the JSON even where the body cannot write."""
    if path == "-":
        with json_beside(path, made()):
            yield
        return
    yield
    if path:
        write_json(path, made())


@contextmanager
def json_beside(path: str | None, value: Any) -> Iterator[None]:
    """As `write_json`, once the body has written what belongs to it: both files are there, or none. Standard
    output has the JSON even where the body cannot write. path: None for no JSON."""
    text = "" if path is None else as_json(value, indent=2) + "\n"
    if path in (None, "-"):
        try:
            yield
        except MopError:
            print(text, end="", flush=True)
            raise
        print(text, end="", flush=True)
        return
    with _aside(Path(path), text.encode()):
        yield
