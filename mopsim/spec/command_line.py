"""How a command ends, for both packages: a user's mistake is one line on standard error and exit code 2."""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from mopsim.spec.errors import MopError


def run_app(app: Callable[..., Any], name: str, arguments: list[str] | None = None) -> NoReturn:
    """Run a typer app and exit: 0 or the command's code, 2 on a user's mistake, 130 where interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    interrupts: list[int] = []
    try:
        _refuse_empty(given)
        with _noting_interrupts(interrupts):
            code = app(given, standalone_mode=False)
    except MopError as error:
        _fail(name, str(error))
    except KeyboardInterrupt:
        _fail(name, "interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:  # what the system refuses, where nothing nearer said it
        where = f"{error.filename}: " if error.filename else ""
        _fail(name, f"{where}{error.strerror or error}")
    except Exception as error:
        if type(error).__name__ == "Abort":
            _fail(name, "interrupted", 130)
        if not hasattr(error, "format_message"):  # typer's own errors have it; anything else is a bug
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            sys.exit(2)
        _fail(name, _usage(error, given))
    if code == 130 and interrupts:  # typer ends on Ctrl-C without a word
        _fail(name, "interrupted", 130)
    sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def _noting_interrupts(found: list[int]) -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt as ever, and noted in `found`, unless a command handles it itself."""

    def note(number: int, frame: FrameType | None) -> None:
        found.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _refuse_empty(arguments: Sequence[str]) -> None:
    """No option means anything by '': not a path (it would be the working directory), nor a name."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, equals, value = argument.partition("=")
        if not argument.strip() or (option.startswith("--") and equals and not value.strip()):
            shown = option if equals else before if before.startswith("--") else "argument"
            raise MopError(f"{shown}: '' must not be empty")


def _usage(error: Any, arguments: Sequence[str]) -> str:
    """`--option: 'value' is refused: rule` for a value that the parser refuses, else its own message."""
    names: list[str] = getattr(getattr(error, "param", None), "opts", None) or []
    value = next((found for name in names if (found := _value(name, arguments)) is not None), None)
    if value is None:
        return str(error.format_message())
    rule = str(error.message).removeprefix("Value error, ").rstrip(".")
    if rule.startswith(repr(value)):
        return f"{names[0]}: {rule}"
    return f"{names[0]}: {value!r} is refused: {rule[:1].lower()}{rule[1:]}"


def _value(option: str, arguments: Sequence[str]) -> str | None:
    """The last value given to `option`, as typed."""
    found = None
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        if argument == option:
            found = following
        elif argument.startswith(f"{option}="):
            found = argument.partition("=")[2]
    return found


def _fail(name: str, message: str, code: int = 2) -> NoReturn:
    line = " ".join(message.split())
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)  # a name may hold anything
    print(f"{name}: {shown}", file=sys.stderr)
    sys.exit(code)
