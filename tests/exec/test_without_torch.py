"""The base install has no torch: mopsim works, mopexec says in one line what to install."""

import subprocess
import sys
from pathlib import Path

import pytest

import mopsim
from tests.patience import HANG

HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
from {package}.cli import main
sys.argv = ["{package}", *{arguments}]
main()
"""


def run(package: str, hidden: set[str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    """A command of `package` in a process where the modules `hidden` cannot be imported."""
    code = HIDE.format(package=package, hidden=hidden, arguments=list(arguments))
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG, check=False
    )


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    strategy = mopsim.mop(dtype="float32")
    job = {"seq_len": 64, "global_batch": 2}
    mopsim.simulate("tiny", "cpu-2core", strategy=strategy, **job).save_plan(path)  # type: ignore[arg-type]
    return path


EXEC = ["train", "dry-run", "verify", "probe"]
OPTIONS = {"train": ["--steps", "1", "--out"], "probe": ["--out"]}


@pytest.mark.parametrize("command", EXEC)
def test_mopexec_without_torch_says_what_to_install(command: str, plan: Path, tmp_path: Path) -> None:
    given = [] if command == "probe" else ["--plan", str(plan)]
    options = [*OPTIONS.get(command, []), *([str(tmp_path / "out")] if command in OPTIONS else [])]
    done = run("mopexec", {"torch", "tokenizers", "pynvml"}, command, *given, *options)
    assert done.returncode == 2
    told = "is not installed, mopexec needs it: pip install 'mop[exec]'\n"
    assert done.stderr in (f"mopexec: torch {told}", f"mopexec: tokenizers {told}")


def test_help_needs_no_torch() -> None:
    done = run("mopexec", {"torch"}, "train", "--help")
    assert done.returncode == 0
    assert "--steps" in done.stdout


def test_mopsim_needs_nothing_of_the_extra(plan: Path) -> None:
    job = ["--model", "tiny", "--hardware", "cpu-2core", "--seq-len", "64", "--global-batch", "2"]
    hidden = {"torch", "tokenizers", "pynvml"}
    done = run("mopsim", hidden, "simulate", *job, "--strategy", str(plan))
    assert done.returncode == 0, done.stderr
    assert run("mopsim", hidden, "search", *job, "--precision", "float32", "--budget", "2").returncode == 0
