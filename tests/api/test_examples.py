"""The examples run, as a reader would run them, and so does the notebook."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import HANG

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = {
    "buyer": "is fastest, ",
    "researcher": "sweep.svg",
    "engineer": "peak of a device: predicted",
}
"""What each prints."""


def environment() -> dict[str, str]:
    """This checkout first, for processes that start elsewhere."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SCRIPTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), str(tmp_path)],
        capture_output=True, text=True, timeout=HANG, check=False, cwd=tmp_path, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert SCRIPTS[name] in done.stdout
    if name == "engineer":
        line = next(line for line in done.stdout.splitlines() if line.startswith("peak of a device"))
        predicted, allocated = (float(word) for word in line.split() if word.replace(".", "").isdigit())
        assert predicted == pytest.approx(allocated, rel=0.01)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    code = (
        "import sys, nbformat; from nbclient import NotebookClient; "
        "NotebookClient(nbformat.read(sys.argv[1], 4), timeout=3600, kernel_name='python3').execute()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(EXAMPLES / "tour.ipynb")],
        capture_output=True, text=True, timeout=HANG, check=False, cwd=tmp_path, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
