"""What a rank leaves behind when it fails: a file of one line for the launcher, the traceback beside it."""

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.common.io import Spec

#: The folder of a run that ranks leave their output and failures in.
LOGS = "logs"


_COMPILER = ("torch._inductor", "torch._dynamo")
_FIELD = "strategy.compile"


class WorkError(MopError):
    """What ended a rank at its work: one line that names it, and no mistake of the input."""


@contextmanager
def at_work(compiles: str = "none") -> Iterator[None]:
    """What is refused in this block is a failure, unless a limit that the user gave is reached. compiles: the
    plan's `strategy.compile`, which a failure of torch's compiler is told with."""
    try:
        yield
    except MopError as error:
        if getattr(error, "stopped_by", ""):
            raise
        raise WorkError(str(error)) from None
    except Exception as error:
        if compiles != "none" and type(error).__module__.startswith(_COMPILER):
            error.add_note(f"{_FIELD}: {compiles}")
        raise


class Failure(Spec, frozen=True, kw_only=True):
    """One rank's failure: when (Unix time), in one line, whether it is the user's to mend, where the
    traceback is ("" = the line says it all). stopped_by: of `OutOfMemory`.
    """

    rank: int
    time: float
    message: str
    user_mistake: bool
    traceback: str = ""
    stopped_by: str = ""


def report(logs: Path, rank: int, error: BaseException) -> Failure:
    """Write rank's failure into `logs` and return it."""
    told = isinstance(error, MopError)
    text = str(error).strip().splitlines()
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(_FIELD)]
    names = [] if told else [*notes, type(error).__name__]
    message = ": ".join([*names, text[0] if text else ""])
    path = logs / f"rank{rank}.traceback.txt"
    failure = Failure(
        rank=rank,
        time=time.time(),
        message=message,
        user_mistake=told and not isinstance(error, WorkError),
        traceback="" if told else str(path),
        stopped_by=getattr(error, "stopped_by", ""),
    )
    try:
        logs.mkdir(parents=True, exist_ok=True)
        if not told:
            path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        io.write_text(logs / f"rank{rank}.failure.json", msgspec.json.encode(failure).decode())
    except (OSError, MopError):  # a full disk: the line on standard error is all there is
        pass
    return failure


def first(logs: Path) -> Failure | None:
    """The earliest failure reported in `logs`: the others usually follow from it."""
    found = [msgspec.json.decode(path.read_bytes(), type=Failure) for path in logs.glob("rank*.failure.json")]
    return min(found, key=lambda failure: failure.time, default=None)


def clear(logs: Path) -> None:
    """Forget the failures of an earlier attempt."""
    for path in logs.glob("rank*.failure.json"):
        path.unlink(missing_ok=True)


def one_line(failure: Failure) -> str:
    """'rank 1 failed: ValueError: ... (traceback: PATH)'; a user's mistake without the rank's story."""
    if failure.user_mistake:
        return f"rank {failure.rank}: {failure.message}"
    trace = f" (traceback: {failure.traceback})" if failure.traceback else ""
    return f"rank {failure.rank} failed: {failure.message}{trace}"


def exit_code(failure: Failure | None) -> int:
    """0 without a failure, 2 for a user's mistake, 1 for the rest."""
    return 0 if failure is None else 2 if failure.user_mistake else 1
