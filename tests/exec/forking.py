"""Programs forked from the server of `tests.exec.spawn`, which has imported all that they do: for tests of
what a run leaves and how it ends. Importing torch costs a process more than all else in most of these.

A program has a process, an environment and output of its own, and forks the ranks that torchrun's agent would
start in it; each is in a session of its own. Where ranks have GPUs they are started: CUDA does not outlive a
fork.
"""

import io
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from tests.exec.spawn import fork_server
from tests.patience import HANG

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def mark(out: object) -> str:
    """What /proc says that processes of a run into `out` are called: at most 15 characters."""
    return f"run {hash(str(out)) & 0xFFFFFFFF:x}"


class Program:
    """`python -m COMMAND` in the environment, as `subprocess.Popen` has it, forked. out: of its run."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], out: Path) -> None:
        self.output = out.with_name(f"{out.name}-output")
        self.output.mkdir(exist_ok=True)
        given = (list(command), dict(environment), self.output, mark(out))
        self._process = fork_server().Process(target=_main, args=given)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):  # it has ended, as subprocess.Popen has it
                os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float = HANG) -> tuple[str, str]:
        """(Standard output, standard error) once it has ended."""
        self._process.join(timeout)
        assert self.returncode is not None, f"still runs after {timeout} s"
        return (self.output / "out").read_text(), (self.output / "err").read_text()


def _main(command: list[str], environment: dict[str, str], output: Path, name: str) -> None:
    import torch
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    def popen(self: Any, args: tuple[str, ...], env: dict[str, str]) -> Rank:
        return Rank(args, env=env, stdout=self._stdout, stderr=self._stderr)

    Path("/proc/self/comm").write_text(name)
    out, error = (os.open(output / one, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for one in ("out", "err"))
    _become(environment, out, error)
    if not torch.cuda.is_available():
        SubprocessHandler._popen = popen  # type: ignore[method-assign]
    _run(command)


class Rank(subprocess.Popen[str]):
    """`[python, ..., "-m", MODULE, *ARGUMENTS]` in a fork of this process. Signals that come meanwhile wait
    until it has handlers of its own: those of its parent would run the parent's end a second time."""

    def _execute_child(self, args: Any, *given: Any) -> None:
        environment, out, error = given[5], given[12], given[14]
        ready, begun = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            os.write(begun, b".")
            _become(environment, out, error)
            _run(list(args[args.index("-m") + 1 :]))
        self._child_created = True
        os.close(begun)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.read(ready, 1)  # a signal to its session finds it
        os.close(ready)


def _become(environment: dict[str, str], out: int, error: int) -> None:
    """What a process has that is started: default signals, an environment and streams. -1: those of its
    parent."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)
    os.environ.clear()
    os.environ.update(environment)
    for number, own in ((1, out), (2, error)):
        if own >= 0:
            os.dup2(own, number)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, "w", closefd=False), write_through=True) for number in (1, 2)
    )


def _run(command: list[str]) -> NoReturn:
    """The module as a program; what the fork has of its parent does not end with it."""
    code: Any = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        sys.argv = command
        for name in [one for one in sys.modules if f"{one}.".startswith(f"{command[0]}.")]:
            del sys.modules[name]
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code if isinstance(code, int) else int(code is not None))
