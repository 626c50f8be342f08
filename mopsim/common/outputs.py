"""Where a command writes, checked before it works: an hour of search must not end at a path it cannot use."""

import os
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO, cast

from mopsim.common.aside import aside
from mopsim.common.errors import MopError

STDOUT = "-"
"""An output path that means standard output, for the options that allow it."""

Output = str | Path | None
_READ: ContextVar[Mapping[str, Any]] = ContextVar("_READ", default=MappingProxyType({}))


def say(line: str, *, stderr: bool = False) -> None:
    """Print a line at once."""
    print(line, file=sys.stderr if stderr else sys.stdout, flush=True)


def plain_console(*, stderr: bool = False, quiet: bool = False) -> Any:
    """A rich console that prints names and paths as they are: `a[red]:car:.yaml` is no style and no emoji."""
    from rich.console import Console

    return Console(stderr=stderr, quiet=quiet, highlight=False, markup=False, emoji=False)


class _Lasting:
    """A text stream; what is written once nobody reads it any more goes nowhere, and a character that its
    encoding lacks is a question mark."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._unread():
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        with self._unread():
            self._stream.flush()

    @contextmanager
    def _unread(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Meanwhile standard output and error take everything, read or not: `mopsim search ... | head` still
    writes the plan that it was asked for, and ends with the code of its answer."""
    given = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and cast(TextIO, _Lasting(stream)) for stream in given)
    try:
        try:
            yield
        except SystemExit:
            _flush()
            raise
        _flush()
    finally:
        sys.stdout, sys.stderr = given


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by whoever started it
            stream.flush()


@contextmanager
def protected(read: Mapping[str, Any]) -> Iterator[None]:
    """Meanwhile `check_outputs` refuses to write over what a command reads. read: a path, or several, by
    option."""
    token = _READ.set(read)
    try:
        yield
    finally:
        _READ.reset(token)


def check_outputs(
    files: Mapping[str, Output] | None = None,
    directories: Mapping[str, Output] | None = None,
    stdout: Sequence[str] = ("--json",),
    inputs: Mapping[str, Any] | None = None,
) -> None:
    """Refuse what can't be written, by option name; None is not asked for, '-' is for those in `stdout`.

    A directory where a file is to be (or the other way round), a file above it, no permission, a path of two
    options, one that the command reads (by its command line, or of the `inputs`), a file in one of the
    directories, which the command fills itself. Makes nothing. Raises MopError.
    """
    taken: dict[str, str] = {}
    directories = directories or {}
    written = {**(files or {}), **directories}
    read = {
        os.path.realpath(path): option
        for option, value in [*_READ.get().items(), *(inputs or {}).items()]
        for path in (value if isinstance(value, list | tuple) else [value])
        if option not in written
    }
    folders = {os.path.realpath(path): option for option, path in directories.items() if path}
    for option, path in written.items():
        if path is None:
            continue
        is_directory = option in directories
        if str(path) == STDOUT and not is_directory and option not in stdout:
            raise MopError(f"{option}: '-' is standard output, a file is needed")
        if str(path) == STDOUT and sys.stdout is None:
            raise MopError(f"{option}: '-' is standard output, which is closed")
        real = STDOUT if str(path) == STDOUT else os.path.realpath(path)
        if real in taken:
            raise MopError(f"{option}: {path} is where {taken[real]} goes too")
        if real in read and not is_directory:
            raise MopError(f"{option}: {path} is what {read[real]} reads")
        above = () if is_directory or real == STDOUT else map(str, Path(real).parents)
        if folder := next((folders[one] for one in above if one in folders), ""):
            raise MopError(f"{option}: {path} lies in {folder}, whose files are the command's own")
        taken[real] = option
        if real != STDOUT:
            _check(option, str(path), Path(real), is_directory)


def _check(option: str, shown: str, real: Path, is_directory: bool) -> None:
    kind = _kind(option, shown, real)
    if is_directory and kind not in ("", "directory"):
        raise MopError(f"{option}: {shown} is a file, a directory is needed")
    if not is_directory and kind == "directory":
        raise MopError(f"{option}: {shown} is a directory, a file is needed")
    if not is_directory and kind == "special":
        raise MopError(f"{option}: {shown} is not a regular file")
    above = real if kind == "directory" else next(a for a in real.parents if _kind(option, shown, a))
    if _kind(option, shown, above) != "directory":
        raise MopError(f"{option}: {shown} cannot be made, {above} is a file")
    try:
        with tempfile.TemporaryFile(dir=above):  # without a name where the system can: nothing is left
            pass
    except OSError as error:
        raise MopError(f"{option}: {shown} cannot be written in {above}: {error.strerror or error}") from None


def _kind(option: str, shown: str, path: Path) -> str:
    """'' where nothing is there, else file, directory or special."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise MopError(f"{option}: {shown}: {error.strerror or error}") from None
    return "directory" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "special"


@contextmanager
def whole_directory(folder: Path) -> Iterator[Path]:
    """A new directory beside `folder` for the body to write in. When it ends well all of its files go to
    `folder`, over those of the same name; when it does not nothing of it is left. Raises MopError where the
    disk is full, or `folder` cannot be made."""
    target = real_path(folder)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with aside(target, directory=True) as beside:
            try:
                yield beside
                _move(beside, target)
            except MopError as error:  # of a file of the report: named where it was to be
                raise MopError(str(error).replace(str(beside), str(folder))) from None
    except OSError as error:
        raise MopError(f"{folder}: cannot be written: {error.strerror or error}") from None


def _move(beside: Path, target: Path) -> None:
    if not target.exists():
        beside.chmod(0o755)
        beside.rename(target)
        return
    places = {path: target / path.relative_to(beside) for path in sorted(beside.rglob("*"))}
    for path, place in places.items():
        if path.is_file():
            check_place(place)
    for path, place in places.items():
        if path.is_dir():
            place.mkdir(exist_ok=True)
        else:
            path.replace(place)


def real_path(path: Path) -> Path:
    """`path`, links followed. Raises MopError for what no path can have, a zero byte."""
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:
        raise MopError(f"{path}: cannot be a path: {error}") from None


def check_place(path: Path) -> None:
    """Raise MopError where a file that was written aside must not take the place of what is there: a
    directory, a device, a pipe."""
    if path.is_dir():
        raise MopError(f"{path}: is a directory, a file is to be written there")
    if path.exists() and not path.is_file():
        raise MopError(f"{path}: is not a regular file, it is not replaced")
