"""Every field of every file, broken in turn, through the commands as users run them: one line, code 2."""

import json
import signal
import sys
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path as File
from types import FrameType
from typing import Any

import pytest

from mopsim.cli import main
from mopsim.common import io, values
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.strategies import mop
from tests.spec.test_refused import Path, leaves, plain, put, tables

JOB = ["--seq-len", "64", "--global-batch", "2"]
#: What no field takes: of another type, of no size, not finite, of two lines.
BROKEN: tuple[Any, ...] = ({"a": 1}, "x\ny", -1, 10**30, float("nan"))
#: Fields of free text, and a rate whose size is the user's own affair.
FREE = {"architecture", "source", "notes", "calibrated_from", "assumptions", "routing"}


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """The one line of a refusal; '' where the command was content."""
    monkeypatch.setattr(sys, "argv", ["mopsim", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    err = capsys.readouterr().err
    if end.value.code == 0:
        return ""
    assert end.value.code == 2, err
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    return err


@pytest.fixture(autouse=True)
def no_endless_run() -> Iterator[None]:
    """A value that makes a command run without end is a bug too."""

    def too_long(number: int, frame: FrameType | None) -> None:
        raise AssertionError("the command did not end")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _profile() -> dict[str, Any]:
    found: dict[str, Any] = plain(load_profile("cpu-2core"))
    for fabric in ("scale_up", "scale_out"):  # the curves of one collective stand for those of the others
        found[fabric]["collectives"] = dict(sorted(found[fabric]["collectives"].items()))
    return found


STRATEGY = plain(
    mop(2, dtype="float32", expert_chunk_tokens=16, optimizer="host_streamed", optimizer_bucket_params=10**6)
)
FILES: dict[str, Any] = {"model": plain(load_model("tiny")), "hardware": _profile(), "strategy": STRATEGY}


def _cases(kind: str) -> Iterator[tuple[Path, Any]]:
    """Every field, the broken values by turns; of a profile's collectives one."""
    fields = [path for path, _ in leaves(FILES[kind]) if not FREE.intersection(str(step) for step in path)]
    fields = [path for path in fields if "collectives" not in path or "all_gather" in path]
    yield from zip(fields, cycle(BROKEN), strict=False)
    for path in tables(FILES[kind]):
        yield (*path, "colour"), "red"


@pytest.mark.parametrize("kind", FILES)
def test_a_broken_field_is_one_line_that_names_it(
    kind: str, tmp_path: File, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, good in FILES.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(good))
    options = [item for name in FILES for item in (f"--{name}", str(tmp_path / f"{name}.yaml"))]
    assert call(capsys, monkeypatch, "simulate", *JOB, *options) == "", "the unbroken files are fine"
    broken = tmp_path / f"{kind}.yaml"
    for path, value in _cases(kind):
        broken.write_text(json.dumps(put(FILES[kind], path, value)).replace("NaN", ".nan"))
        line = call(capsys, monkeypatch, "simulate", *JOB, *options)
        assert line, f"{kind}: {path} = {value!r} was accepted"
        assert any(str(step) in line for step in path if isinstance(step, str)), (path, value, line)


CONTENTS = {
    "empty": b"",
    "binary": bytes(range(256)) * 9,
    "a list": b"- 1",
    "text": b"hello",
    "endless": b"a: &a [*a]",
    "a bomb": b"a: &a [1,1,1,1,1,1,1,1,1,1]\n"
    + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 10)) for i in range(8)),
    "deep": b"[" * 20_000,
    "zeros": b"\0\0",
    "another encoding": "name: x".encode("utf-16"),
    "a number without end": b"hidden_size: " + b"9" * 5000,
}
READERS = [
    ("simulate", "--model", ["--hardware", "cpu-2core", "--strategy", "fsdp2", *JOB]),
    ("simulate", "--hardware", ["--model", "tiny", "--strategy", "fsdp2", *JOB]),
    ("simulate", "--strategy", ["--model", "tiny", "--hardware", "cpu-2core", *JOB]),
    ("export", "--plan", ["--to", "deepspeed", "--out", "-"]),
    ("calibrate", "--profile", ["--measurements", "none", "--out", "new.yaml"]),
    ("calibrate", "--measurements", ["--profile", "cpu-2core", "--out", "new.yaml"]),
    ("validate", "--runs", []),
    ("validate", "--components", []),
]


@pytest.mark.parametrize(("command", "option", "others"), READERS)
def test_a_file_that_is_none_of_the_kind_is_one_line(
    command: str,
    option: str,
    others: list[str],
    tmp_path: File,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(values, "MOST_VALUES", 50_000)  # of the bomb they are counted one by one
    for content in CONTENTS.values():
        (tmp_path / "file.yaml").write_bytes(content)
        assert "file.yaml" in call(capsys, monkeypatch, command, option, "file.yaml", *others)
    (tmp_path / "folder.yaml").mkdir()
    for missing in ("folder.yaml", "nowhere.yaml", "file.yaml/below.yaml", "x" * 300, "a\x1bb.yaml"):
        assert call(capsys, monkeypatch, command, option, missing, *others)
    for nothing in ("", " "):
        line = call(capsys, monkeypatch, command, option, nothing, *others)
        assert f"{option}: '' must not be empty" in line
    assert {path.name for path in tmp_path.iterdir()} == {"file.yaml", "folder.yaml"}


WRITERS = [
    ("simulate", ["--strategy", "fsdp2", "--model", "tiny", "--hardware", "cpu-2core", *JOB], "--json"),
    ("simulate", ["--strategy", "fsdp2", "--model", "tiny", "--hardware", "cpu-2core", *JOB], "--plan"),
    ("simulate", ["--strategy", "fsdp2", "--model", "tiny", "--hardware", "cpu-2core", *JOB], "--trace"),
    ("search", ["--model", "tiny", "--hardware", "cpu-2core", *JOB], "--plan"),
    ("size", ["--model", "tiny", "--hardware", "cpu-2core", "--tokens", "1M", "--days", "1"], "--plan"),
    ("export", ["--plan", "none", "--to", "deepspeed"], "--out"),
    ("calibrate", ["--profile", "cpu-2core", "--measurements", "none"], "--out"),
    ("validate", ["--runs", "none"], "--json"),
]
FOLDERS = [
    ("compare", ["--strategy", "fsdp2", "--model", "tiny", "--hardware", "cpu-2core", *JOB], "--out"),
    ("validate", ["--runs", "none"], "--out"),
    ("demo", [], "--out"),
]


@pytest.mark.parametrize(
    ("command", "others", "option", "is_folder"),
    [(*writer, False) for writer in WRITERS] + [(*folder, True) for folder in FOLDERS],
)
def test_an_output_that_cannot_be_is_refused_before_any_work(
    command: str,
    others: list[str],
    option: str,
    is_folder: bool,
    tmp_path: File,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for wrong in ("file" if is_folder else "folder", "file/below", "file/far/below", "x" * 300, "/dev/null"):
        line = call(capsys, monkeypatch, command, *others, option, wrong)
        assert f"{option}: {wrong}" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "mine"


def test_two_outputs_in_one_place_and_a_plan_on_standard_output_are_refused(
    tmp_path: File, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = WRITERS[0][0], *WRITERS[0][1]
    same = str(tmp_path / "x")
    assert "is where --plan goes too" in call(
        capsys, monkeypatch, *command, "--plan", same, "--json", f"{tmp_path}/./x"
    )
    assert "--plan: '-' is standard output" in call(capsys, monkeypatch, *command, "--plan", "-")


def test_json_does_not_lie_among_the_files_of_its_report(
    tmp_path: File, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command, others, _ = FOLDERS[0]
    for name in ("index.html", "c.json", "deep/c.json"):
        same = f"{tmp_path}/./{name}"
        said = call(capsys, monkeypatch, command, *others, "--out", str(tmp_path), "--json", same)
        assert f"--json: {same} lies in --out, whose files are the command's own" in said
    assert not list(tmp_path.iterdir())


def test_a_written_file_follows_a_link(tmp_path: File) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    io.write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "text"


RELATIONS = [
    (["--routing", "50/9"], "training.routing: '50/9' has more hot experts than num_local_experts 8"),
    (["--global-batch", "99999998"], "makes 49999999 microbatches, more than"),
    (["--seq-len", "1M", "--strategy", "s.yaml"], "strategy.dense.chunk_tokens: 1 cuts"),
    (["--nodes", "0"], "--nodes: '0' is refused: "),
    (["--nodes", "99999999"], "--nodes: '99999999' is refused: "),
    (["--seq-len", "9" * 50], "--seq-len: '9"),
    (["--strategy", "plan.yaml"], "is a plan for the model other (digest"),
]


@pytest.mark.parametrize(("arguments", "says"), RELATIONS)
def test_relations_between_files_and_options(
    arguments: list[str],
    says: str,
    tmp_path: File,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(json.dumps(put(STRATEGY, ("dense", "chunk_tokens"), 1)))
    job = ["--model", "tiny", "--hardware", "cpu-2core", *JOB]
    if "plan.yaml" in arguments:
        made = ["--strategy", "s0.yaml", "--plan", "plan.yaml"]
        (tmp_path / "s0.yaml").write_text(json.dumps(STRATEGY))
        assert call(capsys, monkeypatch, "simulate", *job, *made) == ""
        plan = io.parse_yaml((tmp_path / "plan.yaml").read_text(), "plan")
        (tmp_path / "plan.yaml").write_text(json.dumps(put(plan, ("model", "name"), "other")))
    (tmp_path / "f.yaml").write_text(json.dumps(STRATEGY))
    words = [*job, "--strategy", "f.yaml", *arguments]
    once = dict(zip(words[::2], words[1::2], strict=True))
    assert says in call(capsys, monkeypatch, "simulate", *(word for one in once.items() for word in one))


def test_a_chunk_larger_than_what_there_is_is_one_chunk(
    tmp_path: File, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunk sizes are bounds, not exact sizes: docs/adr/0009."""
    monkeypatch.chdir(tmp_path)
    found = []
    for chunk in (64, 10**9):
        strategy = put(STRATEGY, ("experts", "chunk_tokens"), chunk)
        strategy = put(strategy, ("dense", "chunk_tokens"), chunk)
        (tmp_path / "s.yaml").write_text(json.dumps(strategy))
        job = ["--model", "tiny", "--hardware", "cpu-2core", *JOB, "--strategy", "s.yaml", "--json", "r.json"]
        assert call(capsys, monkeypatch, "simulate", *job) == ""
        result = json.loads((tmp_path / "r.json").read_text())
        found.append((result["step_time_s"], result["memory_by_category_bytes"]))
    assert found[0] == found[1]


def test_a_plan_of_another_job_is_used_with_a_note(
    tmp_path: File, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(json.dumps(STRATEGY))
    job = ["--model", "tiny", "--hardware", "cpu-2core", "--global-batch", "2", "--json", "r.json"]
    first = [*job, "--seq-len", "64", "--strategy", "s.yaml", "--plan", "plan.yaml"]
    assert call(capsys, monkeypatch, "simulate", *first) == ""
    assert call(capsys, monkeypatch, "simulate", *job, "--seq-len", "128", "--strategy", "plan.yaml") == ""
    assert "made for seq_len 64 (here 128)" in json.loads((tmp_path / "r.json").read_text())["notes"][0]
    aside = [*job, "--seq-len", "64", "--strategy", "s.yaml", "--nodes", "2"]
    assert call(capsys, monkeypatch, "simulate", *aside) == ""
    said = " ".join(json.loads((tmp_path / "r.json").read_text())["notes"])
    assert "uses 2 of the 4 devices" in said
    for strategy in ("s.yaml", "plan.yaml"):
        for other in ("float64", "bfloat16"):
            asked = [*job, "--seq-len", "64", "--strategy", strategy, "--precision", other]
            assert f"'{other}' contradicts the strategy" in call(capsys, monkeypatch, "simulate", *asked)


def test_a_sizing_without_an_answer_says_so_and_is_no_success(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = "--model tiny --hardware cpu-2core --tokens 100T --days 1 --max-nodes 1 --family fsdp2"
    monkeypatch.setattr(sys, "argv", ["mopsim", "size", *asked.split()])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 3
    said = capsys.readouterr().err
    assert "no cluster of at most 1 node meets the limits; nearest: 1 node" in said
    assert "it would meet the limits with --days" in said


def test_a_sweep_that_repeats_itself_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: File
) -> None:
    job = ["--model", "tiny", "--hardware", "cpu-2core", *JOB, "--strategy", "fsdp2", "--out", str(tmp_path)]
    line = call(capsys, monkeypatch, "compare", *job, "--sweep", "seq-len=1K,2K,1024")
    assert "sweep: seq_len '1024' is given twice (as '1K')" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["size", "--model", "tiny", "--tokens", "1T", "--days", "1e-320", "--hardware", "h200-sxm-141g"],
         "days: 9.99989e-321 must lie between"),
        (["context", "--model", "tiny", "--nodes", "1", "--hardware", "cpu-2core", "--routing", "50/999",
          "--out", "out"], "has more hot experts than num_local_experts 8"),
        (["context", "--model", "tiny", "--nodes", "65537", "--hardware", "cpu-2core", "--out", "out"],
         "--nodes: 65537 must lie between 1 and 65,536"),
        (["validate", "--runs", "a.csv", "--json", "a.csv"], "--json: a.csv is what --runs reads"),
        (["export", "--plan", "a.yaml", "--to", "torchtitan", "--out", "a.yaml"],
         "--out: a.yaml is what --plan reads"),
        (["validate", "--runs", "\udcff.csv"], "is not UTF-8"),
    ],
)  # fmt: skip
def test_what_a_breaker_found(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: File,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert said in call(capsys, monkeypatch, *arguments)
    assert not list(tmp_path.iterdir())


PLANNED = "; give the file of its --plan"


@pytest.mark.parametrize(
    ("command", "option", "instead"),
    [("simulate", "strategy", PLANNED), ("export", "plan", PLANNED), ("simulate", "model", "")],
)  # fmt: skip
def test_a_result_where_a_noun_is_needed(
    command: str, option: str, instead: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: File,
) -> None:  # fmt: skip
    result = tmp_path / "result.json"
    result.write_text('{"step_time_s": 1.0, "strategy": {"name": "mop"}, "stack": "mopexec-flat"}')
    given = {"model": "tiny", "hardware": "cpu-2core", "strategy": "mop"}
    if command == "export":
        given = {"to": "torchtitan", "out": str(tmp_path / "x")}
    given[option] = str(result)
    job = [*(JOB if command == "simulate" else []), *(f"--{name}={value}" for name, value in given.items())]
    line = call(capsys, monkeypatch, command, *job)
    assert f"{option}: {result}: is a result, the --json of mopsim simulate{instead}" in line


def test_a_file_without_end_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(io, "LARGEST", 1000)
    job = ["--model", "tiny", "--hardware", "cpu-2core", *JOB]
    line = call(capsys, monkeypatch, "simulate", *job, "--strategy", "/dev/zero")
    assert "strategy: /dev/zero: is longer than 1,000 characters" in line
