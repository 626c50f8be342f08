"""What a run keeps, damaged, lost or half renamed: export and --resume name the run's file, or find it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mopexec import data
from mopexec.data.prepare import DataOptions
from mopexec.data.tokenizer import train_tokenizer
from mopexec.run import kept
from mopsim.common.errors import MopError
from tests.exec.test_run_kept import TEXT, Runs

pytestmark = pytest.mark.filterwarnings("default")
DAMAGES = {"cut": b'{"version": ', "empty": b"", "an object": b"{}", "not UTF-8": b"\xff\xfe{}"}
PLACES = ("tokenizer.json", "huggingface/tokenizer.json")
WITHOUT = ", without a tokenizer: the run keeps none; in "


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = Runs(tmp_path_factory.mktemp("trained"))
    code, _, error = runs.train("--steps", 1)
    assert code == 0, error
    return runs.folder / "run"


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Runs:
    """One that trained its tokenizer and made a step."""
    found = Runs(tmp_path)
    shutil.copytree(trained, tmp_path / "run")
    return found


def kept_at(runs: Runs, place: str) -> Path:
    """The run's tokenizer, moved to where it lies if it was trained, or given."""
    path = runs.folder / "run" / place
    path.parent.mkdir(exist_ok=True)
    return (runs.folder / "run" / "tokenizer.json").rename(path)


def prepared(runs: Runs, **given: Any) -> Path:
    options = DataOptions(source=str(runs.folder / "text.txt"), **given)
    return data.prepare(options, 300, runs.folder / "cache")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tokenizer_is_refused_by_its_name_in_the_run(
    damage: str, place: str, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    path = kept_at(runs, place)
    path.write_bytes(DAMAGES[damage])
    _, error = runs.export(capsys, code=2)
    assert error.startswith(f"mopexec: --run: {path}: is no tokenizer.json (")
    assert error.count("\n") == 1
    assert not (runs.folder / "out").exists()
    with pytest.raises(MopError) as refusal:
        prepared(runs, **kept.chosen(None, None, runs.folder / "run", resume=True))
    assert str(refusal.value).startswith(f"--resume: {path}: is no tokenizer.json (")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_given_original_makes_a_damaged_tokenizer_whole(damage: str, runs: Runs) -> None:
    own, given = runs.folder / "run" / PLACES[0], runs.folder / "mine.json"
    shutil.copyfile(own, given)
    own.write_bytes(DAMAGES[damage])
    found = kept.chosen(str(given), None, runs.folder / "run", resume=True)
    assert found == {"trained": str(own), "named_by": "--resume"}
    assert own.read_bytes() == given.read_bytes()


@pytest.mark.parametrize("other", ["another", "damaged too"])
@pytest.mark.parametrize("place", PLACES)
def test_a_damaged_tokenizer_is_made_whole_by_no_other(other: str, place: str, runs: Runs) -> None:
    path, given = kept_at(runs, place), runs.folder / "mine.json"
    path.write_bytes(DAMAGES["cut"])
    train_tokenizer([TEXT[::-1]], 280).save(str(given))
    if other == "damaged too":
        given.write_bytes(DAMAGES["empty"])
    with pytest.raises(MopError, match=f"^--tokenizer: {given} is not {path}, with which this run began$"):
        kept.chosen(str(given), None, runs.folder / "run", resume=True)
    assert path.read_bytes() == DAMAGES["cut"]


def test_a_run_goes_on_once_its_tokenizer_is_whole_again(tmp_path: Path) -> None:
    runs, given = Runs(tmp_path), tmp_path / "mine.json"
    own = tmp_path / "run" / PLACES[1]
    train_tokenizer([TEXT], 290).save(str(given))
    code, _, error = runs.train("--steps", 1, "--tokenizer", given)
    assert code == 0, error
    own.write_bytes(DAMAGES["cut"])
    code, said, error = runs.train("--steps", 2, "--resume", "--tokenizer", given)
    assert code == 0, error
    assert "going on after step 1" in said
    assert own.read_bytes() == given.read_bytes()


def test_a_broken_config_of_a_tokenizer_is_named_in_the_run(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    config = kept_at(runs, PLACES[1]).with_name("tokenizer_config.json")
    config.write_text("{")
    _, error = runs.export(capsys, code=2)
    assert error == f"mopexec: --run: {config}: is not a JSON object\n"
    with pytest.raises(MopError, match=f"--resume: {config}: is not a JSON object"):
        prepared(runs, **kept.chosen(None, None, runs.folder / "run", resume=True))


def test_a_damaged_tokenizer_of_weights_is_not_one_that_was_given(runs: Runs) -> None:
    (runs.folder / "weights").mkdir()
    path = runs.folder / "weights" / "tokenizer.json"
    path.touch()
    with pytest.raises(MopError, match=f"--init-from: {path}: is no tokenizer.json"):
        prepared(runs, **kept.chosen(None, path.parent, runs.folder / "new", resume=False))


@pytest.mark.parametrize("place", PLACES)
def test_a_given_tokenizer_that_cannot_be_read_is_refused(place: str, runs: Runs) -> None:
    kept_at(runs, place)
    (runs.folder / "without").mkdir()
    for given, read in (("nowhere.json", ""), ("without", "/tokenizer.json")):
        path = f"{runs.folder / given}{read}"
        with pytest.raises(MopError, match=f"--tokenizer: {path}: No such file or directory"):
            kept.chosen(str(runs.folder / given), None, runs.folder / "run", resume=True)


@pytest.mark.parametrize("place", PLACES)
def test_a_tokenizer_that_is_gone_is_not_said_never_to_have_been(
    place: str, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    path = kept_at(runs, place)
    path.unlink()
    for _ in range(2):
        said, _ = runs.export(capsys)
        assert WITHOUT in said
        assert not (runs.folder / "out" / "tokenizer.json").exists()
        path.mkdir(exist_ok=True)  # a directory in its place


def test_what_was_not_renamed_is_exported_and_put_back_on_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, given, path = Runs(tmp_path), tmp_path / "mine.json", tmp_path / "run" / PLACES[1]
    train_tokenizer([TEXT], 290).save(str(given))
    code, _, error = runs.train("--steps", 1, "--tokenizer", given)
    assert code == 0, error
    aside = path.parent.rename(runs.folder / "run" / ".huggingface")
    said, error = runs.export(capsys)
    assert "Qwen3MoeForCausalLM" in said, error
    assert "without" not in said
    assert (runs.folder / "out" / "tokenizer.json").read_bytes() == (aside / path.name).read_bytes()
    code, said, error = runs.train("--steps", 2, "--resume")
    assert code == 0, error
    assert "going on after step 1" in said
    assert path.is_file()
    assert not aside.exists()


@pytest.mark.parametrize("before", [True, False], ids=["over another", "first"])
@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_what_is_kept_is_whole_wherever_writing_it_ends(
    renamed: int, before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, weights = tmp_path / "run", tmp_path / "weights"
    weights.mkdir()
    train_tokenizer([TEXT], 280).save(str(weights / "tokenizer.json"))
    for name in ("config.json", "tokenizer_config.json"):
        (weights / name).write_text(json.dumps({"of": "before"}))
    if before:
        kept.keep_given(run, weights, None)
    (weights / "config.json").write_text(json.dumps({"of": "now"}))
    count, rename = [0], Path.rename

    def killed(path: Path, target: Path) -> Path:
        count[0] += 1
        if count[0] > renamed:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        try:
            kept.keep_given(run, weights, None)
        except KeyboardInterrupt:
            whole = before or renamed > 0
            found = {path.name for path in kept.folder_of(run).iterdir()} if whole else set()
            assert (kept.tokenizer_of(run) is not None) == whole
            assert len(found) == 3 * whole
    kept.keep_given(run, weights, None)
    assert json.loads((run / "huggingface" / "config.json").read_text()) == {"of": "now"}
    assert [path.name for path in run.iterdir()] == ["huggingface"]


def test_damaged_reports_of_an_earlier_launch_are_replaced(runs: Runs) -> None:
    """The run writes them anew: they stopped --resume, as if they were read."""
    for name in ("plan.yaml", "measurement.yaml", "summary.json"):
        (runs.folder / "run" / name).write_bytes(DAMAGES["not UTF-8"])
    code, _, error = runs.train("--steps", 2, "--resume")
    assert code == 0, error
    assert json.loads((runs.folder / "run" / "summary.json").read_bytes())["steps_done"] == 2
