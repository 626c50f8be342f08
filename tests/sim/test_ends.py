"""Commands with pools of processes, interrupted or killed: the code says the signal, no process is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mopsim.common.errors import MopError
from mopsim.common.processes import pool
from tests.patience import HANG

ROOT = Path(__file__).parents[2]
CONTEXT = [
    "context",
    "--model",
    "mop_120b",
    "--nodes",
    "2",
    "--jobs",
    "2",
    "--out",
    "report",
]


def marked(mark: str) -> list[int]:
    """Processes started with `mark` in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def sweep(folder: Path) -> subprocess.Popen[str]:
    """A sweep in `folder`, marked by it, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "mopsim.cli", *CONTEXT],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), "SWEEP": str(folder)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str] | None" = None) -> None:
    """Wait until it holds; no longer than `process` lives, if it is of that."""
    end = time.monotonic() + HANG
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_an_ended_sweep_leaves_no_process(number: signal.Signals, tmp_path: Path) -> None:
    mark = f"SWEEP={tmp_path}"
    process = sweep(tmp_path)
    wait_for(lambda: len(marked(mark)) == 3, process)
    if number in (signal.SIGINT, signal.SIGHUP):  # from the terminal: to the whole group
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=HANG)
    said = "" if number == signal.SIGKILL else "interrupted" if number == signal.SIGINT else number.name
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), err
    assert said in err
    assert len(err.splitlines()) == (number != signal.SIGKILL), err
    wait_for(lambda: marked(mark) == [])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone ends a process with its parent")
def test_a_process_of_a_pool_whose_command_was_killed_before_it_began_ends() -> None:
    code = "from mopsim.common.processes import _begin; _begin(1); print('goes on')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANG
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


INTERRUPTED_WHILE_IT_ENDS = """
import os, signal
from mopsim.common import command_line

command_line.REPEAT_SECONDS = 0.0
def app(given, standalone_mode):
    os.kill(os.getpid(), signal.SIGINT)
def ending(*said, **options):
    os.kill(os.getpid(), signal.SIGINT)
command_line._stopped = ending
command_line.run_app(app, "mopsim", ["context"])
"""


def test_a_second_interrupt_before_the_first_was_told_tells_it() -> None:
    """A key that is held for longer than it takes to end: the command ended with 130 and without a word."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_WHILE_IT_ENDS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert (done.returncode, done.stderr) == (130, "mopsim: interrupted\n")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_held_key_ends_a_sweep_once(tmp_path: Path) -> None:
    process = sweep(tmp_path)
    wait_for(lambda: len(marked(f"SWEEP={tmp_path}")) == 3, process)
    for _ in range(20):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.03)
    _, err = process.communicate(timeout=HANG)
    assert (process.returncode, err) == (130, "mopsim: interrupted\n")
    wait_for(lambda: marked(f"SWEEP={tmp_path}") == [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["mopsim", "mopexec"])
def test_an_interruption_of_the_first_imports_is_one_line(package: str) -> None:
    """Whichever module of the project is being imported: all but the one that sees to it."""
    code = (
        "import builtins\n"
        "usual = builtins.__import__\n"
        "def importing(name, *others):\n"
        f"    if name.startswith('mopsim.') and name not in ('{package}.cli', 'mopsim.common.interrupts'):\n"
        "        raise KeyboardInterrupt\n"
        "    return usual(name, *others)\n"
        "builtins.__import__ = importing\n"
        f"import {package}.cli\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANG
    )
    assert (done.returncode, done.stderr) == (130, f"{package}: interrupted\n")


def test_a_signal_is_the_exit_code_where_nobody_reads() -> None:
    """A pager that has gone: what is said on the way out fails, of a progress bar and of the command."""
    code = (
        "import threading\n"
        "from mopsim.common.command_line import run_app\n"
        "def app(arguments, standalone_mode):\n"
        "    try:\n"
        "        print('begun', flush=True)\n"
        "        threading.Event().wait(60)\n"
        "    finally:\n"
        "        print('a progress bar ends', flush=True)\n"
        "run_app(app, 'mopsim', ['x'])\n"
    )
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=pipe, stderr=pipe)
    assert process.stdout.readline() == b"begun\n"
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=HANG) == 143


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the size of files")
def test_a_full_disk_says_nothing_of_a_cache_of_fonts(tmp_path: Path) -> None:
    code = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "import mopsim.report.style, matplotlib.font_manager\n"
    )
    folders = {"MPLCONFIGDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **folders},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not [path for path in tmp_path.iterdir() if path.stat().st_size], "it could not be kept"


def gone() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_the_system_ends_is_one_line() -> None:
    with pytest.raises(MopError, match="one of 2 worker processes was ended by the system"), pool(2) as some:
        some.submit(gone).result()
