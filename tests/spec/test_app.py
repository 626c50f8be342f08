"""The command lines of both packages: an option is given once, and nothing that is read is written over."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from typer.testing import CliRunner

from mopexec.cli import app as mopexec_app
from mopexec.cli import main as mopexec
from mopsim.cli import app as mopsim_app
from mopsim.common.app import READS, written
from mopsim.common.command_line import run_app

JOB = "--model mop_120b --hardware h200-sxm-141g --seq-len 4K --global-batch 8"
RESTRICTED = "--device-limit 1GB --host-limit 1GB"
WRITTEN = {"--cache", "--json", "--out", "--plan", "--program", "--script", "--seal", "--trace"}
#: Texts that name no file: sizes, counts, names.
PLAIN = {
    "--architecture", "--bf16", "--budget", "--contender", "--device-limit", "--document-tokens", "--dtype",
    "--family", "--format", "--fp8", "--global-batch-tokens", "--host-limit", "--host-link",
    "--host-memory", "--log-to", "--max-cost", "--memory", "--memory-bandwidth", "--name", "--nic",
    "--node-power", "--power", "--quantum", "--scale-up", "--seq-len", "--set", "--source", "--sweep",
    "--text-field", "--to", "--tokens", "--tokens-per-device",
}  # fmt: skip


TEXTS = (str, str | None, Path, Path | None, list[str], list[str] | None, list[Path])


def mopsim(arguments: list[str]) -> None:
    run_app(mopsim_app, "mopsim", arguments)


def refused(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], None], line: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(line.split())
    said = capsys.readouterr().err
    assert (end.value.code, said.count("\n")) == (2, 1), said
    return said


@pytest.mark.parametrize(
    ("main", "line", "option"),
    [
        (mopsim, f"simulate {JOB[17:]} --model f --strategy mop --json f", "--json: f is what --model"),
        (mopsim, f"simulate {JOB} --strategy f --trace ./f", "--trace: ./f is what --strategy"),
        (mopsim, f"simulate {JOB} --strategy mop --routing f --plan f", "--plan: f is what --routing"),
        (mopsim, f"search {JOB} --stack f --seal f", "--seal: f is what --stack"),
        (
            mopsim,
            f"compare {JOB} --strategy mop --strategy f --out x --json f",
            "--json: f is what --strategy",
        ),
        (mopsim, "context --model f --nodes 1 --out x --json f", "--json: f is what --model"),
        (mopsim, "size --model tiny --tokens 1T --days 9 --hardware a --hardware f --plan f", "--hardware"),
        (mopsim, "size --model tiny --tokens 1T --days 9 --hardware a --sites f --json f", "--sites"),
        (mopsim, "explore f --out f", "--out: f is what RESULT"),
        (mopsim, "explore r.json --model f --out f", "--out: f is what --model"),
        (mopsim, "export --plan f --to torchtitan --out f", "--out: f is what --plan"),
        (mopsim, "validate --sealed f --measurements m --json f", "--json: f is what --sealed"),
        (mopsim, "validate --sealed s --measurements run --json run/measurement.yaml", "--measurements"),
        (mopsim, "calibrate --profile p --measurements run --out run/measurement.yaml", "--measurements"),
        (mopsim, "calibrate --profile p --measurements run --out o f --json f", "--json: f is what"),
        (mopsim, "profile new --name x --near f --out f", "--out: f is what --near"),
        (mopexec, "dry-run --plan f --json f", "--json: f is what --plan"),
        (mopexec, "verify --plan f --json f", "--json: f is what --plan"),
        (mopexec, "launch --plan f --torchrun --script f -- --steps 3 --out x", "--script: f is what --plan"),
        (mopexec, "launch --plan p --slurm --script f -- --steps 3 --out x --data f", "--script: f is what"),
        (mopexec, f"reach --plan p --plan f {RESTRICTED} --out x --json f", "--json: f is what --plan"),
        (mopexec, "train --plan p --steps 3 --out x --data f --json f", "--json: f is what --data"),
    ],
)
def test_what_a_command_reads_is_not_written_over(
    main: Callable[[list[str]], None], line: str, option: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    kept = [tmp_path / "f", tmp_path / "run" / "measurement.yaml"]
    for path in kept:
        path.write_text("mine")
    said = refused(capsys, main, line)
    assert option in said
    assert " reads" in said
    assert [path.read_text() for path in kept] == ["mine", "mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "run"]


@pytest.mark.parametrize(
    ("main", "line", "said"),
    [
        (mopsim, f"simulate {JOB} --strategy mop --nodes 1 --nodes 2", "--nodes: is given twice"),
        (mopsim, f"search {JOB} --runnable --runnable --top 0", "--top: '0' is refused"),
        (mopsim, "profile new --out a --out=b", "--out: is given twice"),
        (mopexec, "dry-run --plan a --rank 1 --rank 1", "--rank: is given twice"),
        (
            mopexec,
            f"reach --plan p {RESTRICTED} --out x --confirm --no-confirm",
            "--confirm/--no-confirm: is given twice",
        ),
        (
            mopexec,
            "launch --plan a --slurm -- --steps 3 --out x --data d --steps 4",
            "--steps: is given twice",
        ),
    ],
)
def test_an_option_that_is_no_list_is_given_once(
    main: Callable[[list[str]], None], line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, main, line)


SIZE = "size --model tiny --hardware cpu-2core --tokens 1M --days 3"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"simulate {JOB} --strategy mop --nodes 0_1", "--nodes: '0_1' is not a number"),
        (f"simulate {JOB} --strategy mop --interval=0_.9", "--interval: '0_.9' is not a number"),
        (f"{SIZE} --price cpu-2core=1_0", "--price cpu-2core: '1_0' is not a number"),
        (f"{SIZE} --seq-len 256 --global-batch-tokens 1", "global_batch_tokens: 1 is less than one sequence"),
    ],
)
def test_a_number_is_what_people_write_as_one(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, mopsim, line)


def test_every_text_option_is_read_written_or_plain() -> None:
    """A new one has to be told apart: what is read is protected."""
    found = {
        written(param)
        for app in (mopsim_app, mopexec_app)
        for command in _commands(app.parser)
        for param in command.params
        if get_type_hints(command.callback)[param.name] in TEXTS
    }
    assert found == READS | WRITTEN | PLAIN


def test_every_command_says_what_it_found_as_json() -> None:
    for app in (mopsim_app, mopexec_app):
        for command in _commands(app.parser):
            assert "--json" in [written(param) for param in command.params], command.name


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("app", [mopsim_app, mopexec_app], ids=["mopsim", "mopexec"])
def test_help_fits_the_terminal_and_cuts_no_name(
    app: Any, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for path, command in _with_paths(app.parser, ()):
        said = CliRunner().invoke(app, [*path, "--help"]).output
        alone = re.compile(r" +-\S+( <\S+>| / -\S+)" if columns < 80 else "no name is so wide")
        lines = [line for line in said.splitlines() if not alone.fullmatch(line)]
        assert max(map(len, lines)) <= columns, path
        assert not re.search(r"[…│╭]|[a-z]\.\.\.$", said, re.MULTILINE), path
        words = set(re.split(r"[\s,/]+", said))
        shown = [param for param in command.params if not getattr(param, "hidden", False)]
        names = {one for param in shown for one in (*param.opts, *param.secondary_opts)}
        names = {one for one in names if one.startswith("-")} | set(getattr(command, "commands", {}))
        assert names <= words, (path, names - words)


def _with_paths(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group, and how it is called."""
    yield path, command
    for name, one in getattr(command, "commands", {}).items():
        yield from _with_paths(one, (*path, name))


def _commands(command: Any) -> Iterator[Any]:
    for one in getattr(command, "commands", {}).values():
        yield from _commands(one)
    if not getattr(command, "commands", {}):
        yield command
