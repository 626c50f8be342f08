"""A report is written whole or not at all; a command ends well where its reader, or its user, is gone."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from mopsim.common import io
from mopsim.common.aside import aside
from mopsim.common.errors import MopError
from mopsim.common.io import as_json, write_json, write_text
from mopsim.common.outputs import whole_directory
from mopsim.spec.training import TrainSpec


def _broken(out: Path, error: BaseException) -> None:
    with whole_directory(out) as aside:
        (aside / "a.md").write_text("new")
        raise error


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_json_has_no_number_that_json_has_no_word_for(number: float, tmp_path: Path) -> None:
    found = {"runs": [{"error": 1.0}, {"error": number}], "words": "é"}
    with pytest.raises(MopError, match=r"^JSON: runs\[1\]\.error: .* must be a finite number: nothing is"):
        write_json(str(tmp_path / "a.json"), found)
    assert not list(tmp_path.iterdir())
    assert as_json({"a": [1, "é"]}, ascii=False) == '{"a":[1,"é"]}'


def test_json_of_plain_objects_is_written_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing a trace took twice as long: a copy of all its events was made first."""
    made: list[object] = []
    training = TrainSpec(seq_len=64, global_batch=2)
    plain = {"events": [{"at": 1.5, "of": (1, 2)}] * 3}
    whole = as_json(plain | {"training": io.to_plain(training)})
    monkeypatch.setattr(io, "to_plain", lambda one: made.append(one) or msgspec.to_builtins(one))
    assert as_json(plain | {"training": training}) == whole
    assert made == [training]


def _write(out: Path, *names: str) -> None:
    with whole_directory(out) as aside:
        for name in names:
            (aside / name).write_text("new")


def test_a_report_that_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(MopError, match="out: cannot be written: No space left on device"):
        _broken(tmp_path / "out", OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(MopError, match=r"^a\.md: odd$"):
        _broken(tmp_path / "out", MopError("a.md: odd"))
    assert not list(tmp_path.iterdir())


def test_an_earlier_report_stays_until_the_new_one_is_done(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.md").write_text("old")
    (out / "mine.txt").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        _broken(out, KeyboardInterrupt())
    assert (out / "a.md").read_text() == "old"
    with whole_directory(out) as aside:
        (aside / "a.md").write_text("new")
        (aside / "parts").mkdir()
        (aside / "parts" / "b.md").write_text("b")
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == {
        "out/a.md", "out/mine.txt", "out/parts/b.md",
    }  # fmt: skip
    assert (out / "a.md").read_text() == "new"


def _leave(folder: Path, what: str) -> None:
    """Another program writes there, and is killed."""
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from mopsim.common.aside import aside\n"
        f"with aside(Path({str(folder / what)!r}), directory={what == 'c'}) as place:\n"
        "    (place / 'x' if place.is_dir() else place).write_text('half')\n"
        "    print('writing', flush=True)\n"
        "    sys.stdin.read()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdin is not None
        assert other.stdout.readline() == b"writing\n"
        before = {*folder.iterdir()}
        with aside(folder / what, directory=what == "c"):
            assert before < {*folder.iterdir()}, "what another one writes stays"
    assert other.returncode == -signal.SIGKILL


@pytest.mark.parametrize("what", ["c", "r.json"])
def test_what_a_killed_program_left_is_removed(tmp_path: Path, what: str) -> None:
    mine = [tmp_path / name for name in (f".{what}.settings", f".{what}.0123abcd", ".x.json.0123abcd.part")]
    for path in mine:
        path.write_text("mine")
    _leave(tmp_path, what)
    (left,) = {*tmp_path.glob(".*")} - {*mine}
    assert left.name.startswith(f".{what}.")
    with aside(tmp_path / what, directory=what == "c") as place:
        assert {*tmp_path.glob(".*")} == {*mine, place}
    assert {*tmp_path.iterdir()} == {*mine}


def test_a_long_name_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 120 + ".json")
    for _ in range(2):
        write_text(path, "new")
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


JOB = "--model tiny --hardware cpu-2core --seq-len 512 --global-batch 4 --strategy fsdp2"


@pytest.mark.parametrize(
    ("command", "said", "lost"),
    [
        (f"simulate {JOB} --trace t.json", "P(fits): the probability", "t.json"),
        (f"simulate {JOB} --trace t.json --json -", '"step_time_s"', "t.json"),
        (f"simulate {JOB} --plan p.yaml --json -", '"step_time_s"', "p.yaml"),
        (f"search {JOB.partition(' --strategy')[0]} --budget 2 --plan p.yaml --json -", '"top"', "p.yaml"),
        (f"compare {JOB} --budget 2 --out c", "P(fits): the probability", "c/memory.png"),
        (f"compare {JOB} --budget 2 --out c --json -", '"strategies"', "c/memory.png"),
    ],
)
def test_a_full_disk_loses_no_result(tmp_path: Path, command: str, said: str, lost: str) -> None:
    """Files of 3,000 bytes at most, which a plan is longer than: modules compiled meanwhile (-B) would be cut
    off, and stay so."""
    limited = (
        "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (3000, 3000)); from mopsim.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", limited, *command.split()], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert said in done.stdout
    assert done.stderr.splitlines()[-1].endswith(f"{lost}: cannot be written: File too large")
    assert not list(tmp_path.iterdir())


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    """A device or a pipe: as root a rename would put a file in its place."""
    folder = tmp_path / "out"
    folder.mkdir()
    os.mkfifo(pipe := folder / "b.md")
    (tmp_path / "link").symlink_to(pipe)
    for path in (pipe, tmp_path / "link"):
        with pytest.raises(MopError, match=r"b\.md: is not a regular file, it is not replaced"):
            write_text(path, "new")
    with pytest.raises(MopError, match=r"b\.md: is not a regular file"):
        _write(folder, "a.md", "b.md")
    assert [path.name for path in folder.iterdir()] == ["b.md"]
    assert pipe.is_fifo()


def test_a_new_report_is_readable_by_all(tmp_path: Path) -> None:
    with whole_directory(tmp_path / "far" / "out") as aside:
        (aside / "a.md").write_text("a")
    assert (tmp_path / "far" / "out").stat().st_mode & 0o777 == 0o755


def test_a_command_whose_reader_is_gone_works_on(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from rich.console import Console\n"
        "from mopsim.common.command_line import run_app\n"
        "from mopsim.common.io import write_json\n"
        "from mopsim.common.outputs import say\n"
        "def app(arguments, standalone_mode):\n"
        "    console = Console()\n"
        "    for _ in range(3):\n"
        "        say('x'); console.print('x'); write_json('-', {}); sys.stdout.writelines(['x'])\n"
        f"    open({str(tmp_path / 'done')!r}, 'w').close()\n"
        "    return 3\n"
        "run_app(app, 'mopsim', ['x'])\n"
    )
    assert unread("-c", code) == (3, "")
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("command", ["list models", "list stacks --json -", "--help", "search --help"])
def test_every_command_ends_well_where_nobody_reads_it(command: str) -> None:
    assert unread("-m", "mopsim", *command.split()) == (0, "")


TERMINALS: list[dict[str, str]] = [
    {"PYTHONIOENCODING": "ascii", "COLUMNS": "20"}, {"PYTHONIOENCODING": "latin-1", "COLUMNS": "20"},
    {"COLUMNS": "0"}, {"COLUMNS": "\N{SUPERSCRIPT TWO}"}, {"COLUMNS": "9" * 12},
]  # fmt: skip


@pytest.mark.parametrize("terminal", TERMINALS)
@pytest.mark.parametrize("command", ["--help", ""])
def test_a_strange_terminal_is_printed_to(terminal: dict[str, str], command: str) -> None:
    """An encoding without the ellipsis of what is cropped, a size that no terminal has."""
    asked = [sys.executable, "-m", "mopsim", *command.split()]
    done = subprocess.run(asked, capture_output=True, env=os.environ | terminal)
    assert (done.returncode, done.stderr) == (0 if command else 2, b"")
    assert len(done.stdout.split()) > 50


def unread(*arguments: str) -> tuple[int, str]:
    """Exit code and standard error of a Python program whose standard output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    return done.returncode, done.stderr


def test_a_signal_after_the_work_is_done_changes_nothing() -> None:
    code = (
        "import atexit, os, signal\n"
        "from mopsim.common.command_line import run_app\n"
        "atexit.register(lambda: [os.kill(os.getpid(), one) for one in (signal.SIGINT, signal.SIGTERM)])\n"
        "run_app(lambda arguments, standalone_mode: print('done'), 'mopsim', ['x'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
