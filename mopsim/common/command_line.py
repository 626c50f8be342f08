"""How a command ends, for both packages: a user's mistake is one line on standard error and exit code 2."""

import atexit
import errno
import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NoReturn, TextIO

from mopsim.common.errors import MistakesError, MopError, one_line, shown, told
from mopsim.common.garbage import collected_seldom
from mopsim.common.outputs import lasting_streams

REPEAT_SECONDS = 2.0
"""A key that is held down, or a terminal and a supervisor together, send several signals for one wish."""
NOTHING_FITS = 3
"""Exit code where the answer is that nothing fits."""
_FRAGILE = ("importlib._bootstrap", "popen_spawn_posix")


def run_app(app: Callable[..., Any], name: str, arguments: list[str] | None = None) -> NoReturn:
    """Run a typer app and exit: 0 or the command's code, 2 on a user's mistake, 128 + n where signal n ends
    it (SIGINT, SIGTERM or SIGHUP)."""
    given = sys.argv[1:] if arguments is None else arguments
    signals = _Signals(name)
    _forget_sizes()
    try:
        _refuse_empty(given)
        with lasting_streams(), collected_seldom(), _noting_signals(signals):
            code = app(given, standalone_mode=False)
    except Exception as error:
        if signals.came:  # what an interruption became on its way, in an import or a library
            _stopped(signals)
        _explain(error, name, given)
    except KeyboardInterrupt:
        _stopped(signals)
    if code == 130 and signals.came:  # typer ends on Ctrl-C without a word
        _stopped(signals)
    atexit.unregister(ignore_signals)
    atexit.register(ignore_signals, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))  # all is said and done
    sys.exit(code if isinstance(code, int) else 0)


def as_typed(program: str) -> str:
    """This command, for a report: as a shell takes it."""
    return shlex.join([program, *sys.argv[1:]])


def _forget_sizes() -> None:
    """Drop a size of the terminal from the environment that no terminal has: it is asked for its own."""
    for name in ("COLUMNS", "LINES"):
        if re.fullmatch(r"0*[1-9][0-9]{0,3}", os.environ.get(name, "1"), re.ASCII) is None:
            del os.environ[name]


@dataclass
class _Signals:
    """Signals that end a command: those that came, and whether it has said so."""

    name: str
    came: list[int] = field(default_factory=list)
    told: bool = False

    @property
    def first(self) -> int:
        return self.came[0] if self.came else signal.SIGINT

    @property
    def word(self) -> str:
        """What the user reads of it."""
        return (
            "interrupted" if self.first == signal.SIGINT else f"stopped by {signal.Signals(self.first).name}"
        )


def _stopped(signals: _Signals) -> NoReturn:
    signals.told = True
    _fail(signals.name, signals.word, code=128 + signals.first)


def _explain(error: Exception, name: str, given: Sequence[str]) -> NoReturn:
    """End on an error: one line where it is the user's, else the error itself."""
    if isinstance(error, MopError):
        _fail(name, *told(error.lines if isinstance(error, MistakesError) else [str(error)]))
    if isinstance(error, OSError):  # what the system refuses, where nothing nearer said it
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of files, their writers say it
        where = error.filename or ("standard output or shared memory" if full else "")
        _fail(name, f"{where}: {error.strerror or error}" if where else str(error.strerror or error))
    if type(error).__name__ == "Abort":
        _stopped(_Signals(name))
    if not hasattr(error, "format_message"):  # typer's own errors have it; anything else is a bug
        raise error
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message())
        sys.exit(2)
    _fail(name, _usage(error, given))


@contextmanager
def _noting_signals(signals: _Signals) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP are one KeyboardInterrupt and noted in `signals`, unless a command handles
    them itself or whoever started this process had them ignored. More of them within REPEAT_SECONDS are the
    same wish; later ones are another."""
    raised, report, found = -math.inf, sys.unraisablehook, signals.came

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        if number != signal.SIGALRM:
            found.append(number)
            if time.monotonic() < raised + REPEAT_SECONDS:
                return
        if fragile(frame):
            again()
        else:
            raised = time.monotonic()
            raise KeyboardInterrupt

    def again() -> None:
        signal.signal(signal.SIGALRM, note)
        signal.setitimer(signal.ITIMER_REAL, 0.02)

    def lost(what: "sys.UnraisableHookArgs") -> None:  # raised in a finalizer or beside a fork
        if issubclass(what.exc_type, KeyboardInterrupt):
            again()
        else:
            report(what)

    def leave(number: int, frame: FrameType | None) -> None:
        if time.monotonic() > raised + REPEAT_SECONDS:
            with suppress(OSError):  # nobody reads it any more
                os.write(2, b"" if signals.told else f"{signals.name}: {signals.word}\n".encode())
            os._exit(128 + signals.first)

    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    ours = {number: handler for number, handler in usual.items() if signal.getsignal(number) is handler}
    for number in ours:
        signal.signal(number, note)
    sys.unraisablehook = lost
    try:
        yield
    finally:
        sys.unraisablehook = report
        if found:
            signal.setitimer(signal.ITIMER_REAL, 0)
            atexit.register(ignore_signals, tuple(ours))
        for number, handler in ours.items():
            if signal.getsignal(number) is note:
                signal.signal(number, leave if found else handler)


def ignore_signals(numbers: Iterable[int]) -> None:
    """For a process that is ending: another signal changes neither its exit code nor what it said."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def fragile(frame: FrameType | None) -> bool:
    """Whether an exception at `frame` would be lost or do harm: while a module is imported (compiled ones
    lose it, or abort on it), or a process of multiprocessing is sent what it starts from."""
    while frame is not None and not any(name in frame.f_code.co_filename for name in _FRAGILE):
        frame = frame.f_back
    return frame is not None


def _refuse_empty(arguments: Sequence[str]) -> None:
    """No option means anything by '': not a path (it would be the working directory), nor a name."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, equals, value = argument.partition("=")
        name = option if equals else before if before.startswith("--") else "argument"
        if not argument.isprintable() and any(0xD800 <= ord(one) <= 0xDFFF for one in argument):
            raise MopError(f"{name}: {shown(argument)} is not UTF-8")
        if not argument.strip() or (option.startswith("--") and equals and not value.strip()):
            raise MopError(f"{name}: '' must not be empty")


_OF_A_TYPE = "Value error, "
"""What the parser puts before the message of a value's type."""


def _usage(error: Any, arguments: Sequence[str]) -> str:
    """`--option: 'value' is refused: rule` for a value that the parser refuses, else its own message."""
    names: list[str] = getattr(getattr(error, "param", None), "opts", None) or []
    value = next((found for name in names if (found := _value(name, arguments)) is not None), None)
    if value is None:
        return str(error.format_message()).replace(_OF_A_TYPE, "")
    rule = str(error.message).removeprefix(_OF_A_TYPE).rstrip(".")
    if rule.startswith(repr(value)):
        return f"{names[0]}: {rule}"
    return f"{names[0]}: {shown(value)} is refused: {rule[:1].lower()}{rule[1:]}"


def _value(option: str, arguments: Sequence[str]) -> str | None:
    """The last value given to `option`, as typed."""
    found = None
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        if argument == option:
            found = following
        elif argument.startswith(f"{option}="):
            found = argument.partition("=")[2]
    return found


def _fail(name: str, *messages: str, code: int = 2) -> NoReturn:
    with suppress(OSError, ValueError):  # nobody reads it any more
        for message in messages:
            print(f"{name}: {one_line(' '.join(message.split()))}", file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):
        _let_go(stream)
    sys.exit(code)


def _let_go(stream: TextIO | None) -> None:
    """What a stream cannot be rid of must not change the exit code when Python flushes it at the end."""
    try:
        if stream is not None:
            stream.flush()
    except OSError:
        assert stream is not None
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except ValueError:  # closed
        pass
